// rest_linux_test.go: what clusters cost once nothing happens any more, and on
// lines that are long.

package test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	restAfter   = 20 * time.Second // the last fault
	restWindow  = 5 * time.Second
	restChances = 3   // of windows: a busy machine makes an agent late now and then
	restPackets = 2.2 // a second and member: its heartbeats, and a little air
)

// atRest demands what holds of members 20 s after the last fault, whatever it
// was: they send their heartbeats, and nothing else, and log nothing.
func (w *world) atRest(c ...*agent) {
	w.Helper()
	time.Sleep(restAfter)
	mark := time.Now()
	for chance := 1; ; chance++ {
		packets, bytes := w.line.rate(restWindow, hostsOf(c)...)
		w.Logf("at rest: %.2f packets and %.0f bytes a second and member", packets, bytes)
		if packets <= restPackets {
			break
		}
		if chance == restChances {
			w.Errorf("%v after the last fault each member sends %.2f packets a second, want at most %v", restAfter, packets, restPackets)
			break
		}
	}

	probes := 0
	for _, a := range c {
		for _, l := range a.since(mark) {
			if strings.Contains(l.text, "[TRACE]") || strings.Contains(l.text, "[DEBUG]") {
				probes++
			} else {
				w.Errorf("%s logs at rest: %s", a.name, l.text)
			}
		}
	}
	w.Logf("and %d probes or other lines of debugging in %v", probes, time.Since(mark).Round(time.Second))
}

// restTests are lives after which a cluster is to be at rest.
var restTests = []struct {
	after string
	hosts int
	line  route
	live  func(*world) []*agent
}{
	{"late seeds", 8, nearby, seedThatIsLate},
	{"a restart of all", 5, nearby, restartOfAll},
	{"a split", 8, nearby, healedSplit},
	{"names moved", 8, nearby, movedNames},
	{"joins on a long line", 6, func(from, to int) trip { return trip{delay: 150 * ms} }, joined},
}

// The others wait until it has ended: beside them a busy machine sends late heartbeats, and late ones cost probes.
func TestRestIsQuiet(t *testing.T) {
	var running sync.WaitGroup // all at once: they only wait
	for _, r := range restTests {
		running.Go(func() {
			t.Run("after "+r.after, func(t *testing.T) {
				w := newFarWorld(t, r.hosts, r.line)
				w.atRest(r.live(w)...)
			})
		})
	}
	running.Wait()
}

// resting starts an agent that logs its probes.
func (w *world) resting(host int, args ...string) *agent {
	w.Helper()
	return w.start(host, append([]string{"-log-level", "trace"}, args...)...)
}

// gather waits until each agent shows so many alive.
func (w *world) gather(within time.Duration, n int, c ...*agent) {
	w.Helper()
	began := time.Now()
	for _, a := range c {
		out, errs, code := a.run("members", "-wait", fmt.Sprint(n), "-timeout", (within - time.Since(began)).String())
		if code != 0 {
			w.Fatalf("%s does not show %d alive within %v: %s%s", a.name, n, within, errs, out)
		}
	}
	w.Logf("%d show %d alive after %v", len(c), n, time.Since(began).Round(time.Millisecond))
}

// joined has agents that join the first.
func joined(w *world) (c []*agent) {
	for i := 1; i <= w.hosts; i++ {
		c = append(c, w.resting(i, "-join", "10.77.0.1"))
	}
	w.gather(15*time.Second, w.hosts, c...)
	return c
}

// seedThatIsLate has a seed that starts long after those that wait for it.
func seedThatIsLate(w *world) (c []*agent) {
	for i := 2; i <= w.hosts; i++ {
		c = append(c, w.resting(i, "-join", "10.77.0.1"))
	}
	time.Sleep(3 * time.Second)
	c = append(c, w.resting(1))
	w.gather(10*time.Second, w.hosts, c...)
	return c
}

// restartOfAll kills one agent after the other and starts it anew. None is told
// whom to join: they were by hand once, and since then the others find them.
func restartOfAll(w *world) (c []*agent) {
	for i := 1; i <= w.hosts; i++ {
		c = append(c, w.resting(i))
	}
	for _, a := range c[1:] {
		a.run("join", "10.77.0.1")
	}
	w.gather(10*time.Second, w.hosts, c...)
	for i, a := range c {
		w.settle()
		a.signal(syscall.SIGKILL)
		a.exit(5 * time.Second)
		time.Sleep(500 * ms)
		c[i] = w.resting(a.host)
		w.gather(10*time.Second, w.hosts, c...)
	}
	return c
}

// healedSplit cuts a cluster in two halves, and joins them again.
func healedSplit(w *world) []*agent {
	c := joined(w)
	w.settle()
	w.line.cut(func(host int) bool { return host > w.hosts/2 })
	w.agree(10*time.Second, "n1:alive n2:alive n3:alive n4:alive n5:failed n6:failed n7:failed n8:failed", c[:4]...)
	w.agree(10*time.Second, "n1:failed n2:failed n3:failed n4:failed n5:alive n6:alive n7:alive n8:alive", c[4:]...)
	w.line.use(nearby)
	w.agree(5*time.Second, everybody(w.hosts), c...)
	return c
}

// movedNames has two hosts vanish, one after the other, and their names come
// back on other hosts.
func movedNames(w *world) (c []*agent) {
	n := w.hosts - 2
	for i := 1; i <= n; i++ {
		c = append(c, w.resting(i, "-join", "10.77.0.1"))
	}
	w.gather(10*time.Second, n, c...)
	for host := n + 1; host <= w.hosts; host++ {
		w.settle()
		old := c[n-1]
		w.line.cut(func(h int) bool { return h == old.host })
		moved := w.resting(host, "-node", old.name, "-join", "10.77.0.1")
		c = append([]*agent{moved}, c[:n-1]...)
		w.until(6*time.Second, func() string { return old.name + " has moved" }, func() bool {
			return !slices.ContainsFunc(c, func(a *agent) bool { return a.member(old.name).Addr != moved.advertised })
		})
		w.gather(10*time.Second, n, c...)
		old.signal(syscall.SIGKILL)
	}
	return c
}

// ---- long lines ----

func TestLineOf1600MillisecondsJoinsAndFailsNobody(t *testing.T) {
	t.Parallel()
	w := newFarWorld(t, 4, func(from, to int) trip { return trip{delay: 800 * ms} })
	var c []*agent
	for i := 1; i <= w.hosts; i++ {
		c = append(c, w.start(i, "-join", "10.77.0.1"))
	}
	w.gather(20*time.Second, w.hosts, c...)
	mark := time.Now()
	time.Sleep(15 * time.Second)
	w.silent(mark, "", c...)
	w.agree(0, everybody(w.hosts), c...)
	for _, a := range c {
		if l := a.find(time.Time{}, "member-failed"); l != nil {
			t.Errorf("%s logs %s", a.name, l.text)
		}
	}
}

// What a lost heartbeat costs on a line is a ping and its answer.
func TestLineOf150MillisecondsThatLosesCostsLittleAtRest(t *testing.T) {
	t.Parallel()
	const bytesAtMost = 300
	w := newFarWorld(t, 6, func(from, to int) trip { return trip{delay: 75 * ms, loss: .01} })
	c := joined(w)
	time.Sleep(8 * time.Second)
	mark := time.Now()
	packets, bytes := w.line.rate(15*time.Second, hostsOf(c)...)
	probes := 0
	for _, a := range c {
		for _, l := range a.since(mark) {
			if strings.Contains(l.text, "probing") {
				probes++
			}
		}
	}
	t.Logf("%.1f packets and %.0f bytes a second and member, and %d probes", packets, bytes, probes)
	if bytes > bytesAtMost {
		t.Errorf("at rest each member sends %.0f bytes a second, want at most %d", bytes, bytesAtMost)
	}
	w.silent(mark, "", c...)
}
