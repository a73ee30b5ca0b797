// benchfar_linux_test.go: the rows of the bench on lines between hosts that are
// far from each other.

package test

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"
)

const (
	farHosts     = 12
	farRegions   = 3                // near within, far from each other
	farSlow      = 1600 * ms        // a round trip, of the slowest line
	farPatience  = 40 * time.Second // with joins on it
	farLives     = 20 * time.Second // on it
	nemesisHosts = 15
	nemesisFirst = 5 // hosts to which nothing happens but bad lines
)

func benchFar(t *testing.T, c *contender, _ int) {
	if benchWants("far-rest") {
		t.Run("rest", func(t *testing.T) { benchFarRest(t, c) })
	}
	if benchWants("far-join") {
		for _, rtt := range []time.Duration{150 * ms, 300 * ms, 600 * ms} {
			benchFarJoin(t, c, rtt)
		}
	}
	if benchWants("far-slow") {
		t.Run("slow", func(t *testing.T) { benchFarSlow(t, c) })
	}
	if benchWants("far-fail") {
		t.Run("fail", func(t *testing.T) { benchFarFail(t, c) })
	}
	if benchWants("far-nemesis") {
		t.Run("nemesis", func(t *testing.T) { benchFarNemesis(t, c) })
	}
}

func newFarCluster(t *testing.T, c *contender, hosts int, r route) *benchCluster {
	t.Helper()
	w := newFarWorld(t, hosts, r)
	cl := newBenchCluster(t, c)
	cl.far = w
	return cl
}

// farApart has hosts in regions that are far from each other.
func farApart(rtt time.Duration, loss float64) route {
	return regions(farRegions, trip{delay: rtt / 2, loss: loss})
}

func benchFarRest(t *testing.T, c *contender) {
	cl := newFarCluster(t, c, farHosts, farApart(150*ms, .01))
	cl.startAll(farHosts, func(int) []string { return []string{"-log-level=trace"} })
	time.Sleep(benchRest)
	cl.traffic(fmt.Sprintf("far, 150ms round trip, 1 %% loss, N=%d", farHosts), farHosts, benchIdle)
}

func benchFarJoin(t *testing.T, c *contender, rtt time.Duration) {
	var took []time.Duration
	for range 3 {
		t.Run("join", func(t *testing.T) {
			took = append(took, newFarCluster(t, c, farHosts, farApart(rtt, 0)).startAll(farHosts, nil))
		})
	}
	if len(took) > 0 { // else they were skipped
		c.putTimes(fmt.Sprintf("far, %v round trip: %d agents joined after the last start", rtt, farHosts), took)
	}
}

// benchFarSlow asks whether agents get together on a line that is slower than
// most, and stay together. That they do not is a figure.
func benchFarSlow(t *testing.T, c *contender) {
	const n = 4
	label := fmt.Sprintf("far, %v round trip: %d agents joined after the last start, ms", farSlow, n)
	cl := newFarCluster(t, c, n, func(from, to int) trip { return trip{delay: farSlow / 2} })
	all := cl.watch(n*(n-1), sighting{kind: "join"})
	for i := range n {
		cl.start(i, cl.address(i))
		if i == cl.seed {
			time.Sleep(time.Second) // Serf's -join tries once
		}
	}
	began := time.Now()
	_, last, err := all.within(farPatience)
	if err != nil {
		fmt.Printf("%s: %s: %v\n", c.name, label, err)
		c.put(label, inMs(never))
		return
	}
	c.put(label, inMs(last.Sub(began)))

	wrong := cl.wrongSoFar()
	time.Sleep(farLives)
	c.put(fmt.Sprintf("far, %v round trip: called failed in %v", farSlow, farLives), float64(cl.wrongSoFar()-wrong))
}

// benchFarFail kills agents, and has hosts vanish, on a line that loses.
func benchFarFail(t *testing.T, c *contender) {
	const n = farHosts
	r := farApart(300*ms, .02)
	cl := newFarCluster(t, c, n, r)
	cl.startAll(n, nil)
	time.Sleep(benchLate)

	var killed, vanished []time.Duration
	for _, i := range []int{2, 3, 6, 8, 9} {
		name := cl.agents[i].name
		failed := cl.watch(n-1, sighting{kind: "failed", name: name})
		at := cl.end(cl.agents[i], syscall.SIGKILL)
		_, last := failed.must("all say that %s, which was killed, has failed", name)
		killed = append(killed, last.Sub(at))
		cl.restart(i, n)
	}
	c.putTimes("far, 300ms round trip, 2 % loss: kill -9: every peer says failed", killed)

	for _, i := range []int{4, 7, 10} {
		a := cl.agents[i]
		failed := cl.watch(n-1, sighting{kind: "failed", name: a.name})
		cl.blame(a, true)
		cl.isolate(a, true)
		at := time.Now()
		cl.far.line.cut(func(host int) bool { return host == i+1 })
		_, last := failed.must("all say that %s, whose host vanished, has failed", a.name)
		vanished = append(vanished, last.Sub(at))
		cl.end(a, syscall.SIGKILL)
		cl.far.line.use(r)
		cl.isolate(a, false)
		cl.restart(i, n)
	}
	c.putTimes("far, 300ms round trip, 2 % loss: a host vanishes: every peer says failed", vanished)
}

// wrongSoFar is how often living members were called failed.
func (cl *benchCluster) wrongSoFar() int {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	return len(cl.c.wrong)
}

// isolate says whether an agent may call all others failed.
func (cl *benchCluster) isolate(a *benchAgent, may bool) {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.cut[a.name] = may
}

// ---- nemesis ----

// nemesis does to far hosts what it likes, while some of them send events.
type nemesis struct {
	*benchCluster
	dice   *rand.Rand
	events []*benchWatch
}

func benchFarNemesis(t *testing.T, c *contender) {
	length := time.Duration(envInt("BENCH_NEMESIS", 60)) * time.Second
	seed := uint64(envInt("BENCH_SEED", 1))
	cl := newFarCluster(t, c, nemesisHosts, farApart(100*ms, 0))
	m := &nemesis{benchCluster: cl, dice: rand.New(rand.NewPCG(seed, 0))}
	fmt.Printf("BENCH_SEED=%d BENCH_NEMESIS=%d\n", seed, int(length.Seconds()))
	cl.startAll(nemesisHosts, nil)
	time.Sleep(benchLate)

	wrong := cl.wrongSoFar()
	faults := 0
	for end := time.Now().Add(length); time.Now().Before(end); faults++ {
		cl.far.line.use(m.badLines())
		m.fault()
	}
	time.Sleep(benchRest)
	wrong = cl.wrongSoFar() - wrong
	label := fmt.Sprintf("far, nemesis of %v on %d hosts", length, nemesisHosts)
	fmt.Printf("%s: %s: %d faults\n", c.name, label, faults)
	c.put(label+": living members called failed", float64(wrong))
	c.put(fmt.Sprintf("%s: events that did not come, of %d", label, len(m.events)*nemesisFirst), float64(m.missing()))
}

// badLines is a route on which each line has a round trip of up to 500 ms, some
// jitter and some loss.
func (m *nemesis) badLines() route {
	trips := make([][]trip, nemesisHosts+1)
	for from := range trips {
		for range nemesisHosts + 1 {
			delay := time.Duration(m.dice.IntN(250)) * ms
			trips[from] = append(trips[from], trip{delay: delay, jitter: delay / 5, loss: .02 * m.dice.Float64()})
		}
	}
	return func(from, to int) trip { return trips[from][to] }
}

// fault does something to a host, for some seconds.
func (m *nemesis) fault() {
	i := nemesisFirst + m.dice.IntN(nemesisHosts-nemesisFirst)
	a := m.agents[i]
	length := time.Duration(1+m.dice.IntN(8)) * time.Second
	switch m.dice.IntN(4) {
	case 0: // the process is killed, and comes back
		m.blame(a, true)
		m.end(a, syscall.SIGKILL)
		<-a.ended
		m.meanwhile(length)
		m.start(i, a.ip)
		m.meanwhile(benchLate)
		m.blame(a, false)

	case 1: // the host is cut off, and comes back
		m.blame(a, true)
		m.isolate(a, true)
		r := *m.far.line.route.Load()
		m.far.line.cut(func(host int) bool { return host == i+1 })
		m.meanwhile(length)
		m.far.line.use(r)
		m.meanwhile(2 * benchLate) // news of it may be under way still
		m.blame(a, false)
		m.isolate(a, false)

	case 2: // the process stalls
		a.signal(syscall.SIGSTOP)
		m.meanwhile(min(length, 3*time.Second))
		a.signal(syscall.SIGCONT)

	case 3: // nothing but the lines
		m.meanwhile(length)
	}
}

// meanwhile passes time, in which hosts to which nothing happens send events.
func (m *nemesis) meanwhile(length time.Duration) {
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(500 * ms) {
		name := fmt.Sprintf("nemesis%d", len(m.events))
		m.events = append(m.events, m.watch(nemesisHosts, sighting{kind: "user", name: name}))
		m.run(m.agents[m.dice.IntN(nemesisFirst)], "event", "-coalesce=false", name)
	}
}

// missing counts events that did not come to hosts to which nothing happened.
func (m *nemesis) missing() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.events {
		for _, a := range m.agents[:nemesisFirst] {
			if !w.seen[a.name+" "+w.like.name] {
				n++
			}
		}
	}
	return n
}
