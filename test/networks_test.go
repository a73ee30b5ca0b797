//go:build linux

// Real agents on real networks: each host is a network namespace, all of them
// hang on a switch in a namespace of its own, and nothing touches the machine's
// own network.
//
// Bounds are two to three times the figure that is aimed at, since machines
// are shared; what was measured is in the log (-v).

package test

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The tests wait far more than they work, so several run side by side. Those
// that do work come last and alone.
func TestOnRealNetworks(t *testing.T) {
	t.Parallel()
	needNamespaces(t)
	side, alone := make(chan struct{}, 8), slices.IndexFunc(netnsTests, func(n netnsTest) bool { return n.alone })
	var running sync.WaitGroup
	for _, n := range netnsTests[:alone] {
		side <- struct{}{}
		running.Go(func() {
			t.Run(n.fact, func(t *testing.T) { n.run(newWorld(t, n.hosts)) })
			<-side
		})
	}
	running.Wait()
	for _, n := range netnsTests[alone:] {
		t.Run(n.fact, func(t *testing.T) { n.run(newWorld(t, n.hosts)) })
	}
}

type netnsTest struct {
	fact  string
	hosts int
	run   func(*world)
	alone bool
}

// Long ones first.
var netnsTests = []netnsTest{
	{"a process that is stopped for 12 s fails and comes back", 5, stoppedForTwelve, false},
	{"a split half and half heals", 8, splitHeals, false},
	{"when a name lived on both sides of a split the younger gives way", 6, twinsAfterASplit, false},
	{"a host that vanishes fails and returns: its cable", 8, func(w *world) { hostVanishes(w, 0, "link set h8 down", "link set h8 up") }, false},
	{"a host that vanishes fails and returns: in silence", 8, func(w *world) { hostVanishes(w, 0, "link set h8 nomaster", "link set h8 master br0") }, false},
	{"a host that vanishes fails and returns: its interface", 8, func(w *world) { hostVanishes(w, 8, "link set eth0 down", "link set eth0 up") }, false},
	{"a host that vanishes fails and returns: of three", 3, func(w *world) { hostVanishes(w, 0, "link set h3 down", "link set h3 up") }, false},
	{"a host that vanishes fails and returns: of two", 2, func(w *world) { hostVanishes(w, 0, "link set h2 nomaster", "link set h2 master br0") }, false},
	{"a process that is stopped for 8 s is never called failed", 5, stoppedForEight, false},
	{"one way packet loss between a pair fails nobody", 5, oneWayLoss, false},
	{"blocked UDP between a pair is one warning at each end", 5, udpBlocked, false},
	{"a firewall that rejects TCP fails nobody", 5, tcpRejected, false},
	{"leaving takes 2 s at most when every peer is gone", 4, leaveAlone, false},
	{"twenty dead seeds do not hold up a good one", 2, deadSeeds, false},
	{"the start order does not matter", 2, startOrder, false},
	{"a cluster whose seed comes late is as quiet as any", 8, lateSeed, false},
	{"retry-max ends an agent that finds no seed", 1, retryMax, false},
	{"a seed may advertise another address", 2, seedElsewhere, false},
	{"a restart is a failure and a join", 5, restarts, false},
	{"of two newcomers with one name one gives way", 4, twinsAtOnce, false},
	{"the dead are forgotten in time", 3, reaped, false},
	{"a name may come back at another address", 6, nameMoves, false},
	{"a stalled holder of a name keeps it", 6, stalledHolder, false},
	{"an address that the others do not reach is few failures and one warning", 4, unreachableAddress, false},
	{"a living name cannot be taken", 6, nameTaken, false},
	{"a new name at a dead one's address does not revive it", 5, addressReused, false},
	{"force-leave reaches everywhere and stays", 4, forceLeaves, false},
	{"a seed is found as soon as the resolver has an answer", 2, slowResolver, false},
	{"a name that is still looked up holds up no other seed", 2, hangingResolver, false},
	{"one address of a name is enough", 2, oneFamilyAnswers, false},
	{"an interface that has no address yet is waited for", 2, interfaceWithoutAddress, false},
	{"an advertised name that has no address yet is waited for", 2, nameWithoutAddress, false},
	{"a cluster lives on link-local addresses", 3, onlyLinkLocal, false},
	{"a host with IPv6 alone needs no options", 3, ipv6ByDefault, false},
	{"a host with IPv6 alone joins one with both families", 2, ipv6JoinsBoth, false},
	{"a seed is joined by a link-local IPv6 address", 3, linkLocalIPv6Seed, false},
	{"a seed takes the address at which its first peer comes", 3, seedOnTwoNetworks, false},
	{"a lone node whose address changes is joined at the new one", 2, loneAddressChanges, false},
	{"the advertised address is one that others reach", 0, advertised, false},
	{"a node that starts before its network advertises what comes", 2, networkComesLate, false},
	{"a node whose address changes advertises the new one", 4, func(w *world) { addressChanges(w) }, false},
	{"a node that advertises an interface follows it", 4, func(w *world) { addressChanges(w, "-iface", "eth0") }, false},
	{"a cluster lives on IPv6", 3, onlyIPv6, false},
	{"both address families live in one cluster", 4, bothFamilies, false},
	{"a full disk ends no agent", 3, fullDisk, false},
	{"an agent with 64 file descriptors keeps its place", 1, fewDescriptors, true},
	{"the end of a process is noticed at once", 8, endNoticed, true},
	{"a hundred joins in a second converge", 1, manyJoins, true},
}

// ---- facts ----

func endNoticed(w *world) {
	c := w.cluster(8)
	for _, end := range []struct {
		signal syscall.Signal
		event  string
	}{{syscall.SIGKILL, "member-failed"}, {syscall.SIGTERM, "member-failed"}, {syscall.SIGINT, "member-leave"}} {
		a := c[len(c)-1]
		c = c[:len(c)-1]
		mark := time.Now()
		a.signal(end.signal)
		w.hear(600*time.Millisecond, mark, end.event+": "+a.name+" ", c...)
		if code := a.exit(5 * time.Second); end.signal == syscall.SIGINT && code != 0 {
			w.Errorf("SIGINT: exit status %d", code)
		}
		w.silent(mark, a.name+" ", c...)
		w.settle()
	}
}

func stoppedForEight(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	c[4].signal(syscall.SIGSTOP)
	time.Sleep(8 * time.Second)
	c[4].signal(syscall.SIGCONT)
	time.Sleep(2 * time.Second)
	w.silent(mark, "", c...)
}

func stoppedForTwelve(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	c[4].signal(syscall.SIGSTOP)
	if first, _ := w.hear(15*time.Second, mark, "member-failed: n5 ", c[:4]...); first < 9*time.Second {
		w.Errorf("called failed after %v", first)
	}
	time.Sleep(time.Until(mark.Add(12 * time.Second)))
	back := time.Now()
	c[4].signal(syscall.SIGCONT)
	w.hear(4*time.Second, back, "member-join: n5 ", c[:4]...)
	w.agree(2*time.Second, everybody(5), c...)
	w.silent(mark, "n5 ", c...)
}

// hostVanishes cuts the last host off, with an ip command in the namespace ns,
// and mends it.
func hostVanishes(w *world, ns int, cut, mend string) {
	c := w.cluster(w.hosts)
	last, rest := c[w.hosts-1], c[:w.hosts-1]
	lonely := strings.ReplaceAll(everybody(w.hosts), "alive", "failed")
	lonely = strings.Replace(lonely, last.name+":failed", last.name+":alive", 1)
	mark := time.Now()
	w.ip(ns, cut)
	w.agree(10*time.Second, lonely, last)
	w.hear(6*time.Second, mark, "member-failed: "+last.name+" ", rest...)
	time.Sleep(time.Second)
	back := time.Now()
	w.ip(ns, mend)
	w.agree(6*time.Second, everybody(w.hosts), c...)
	w.hear(6*time.Second, back, "member-join: "+last.name+" ", rest...)
	time.Sleep(time.Second)
	w.agree(0, everybody(w.hosts), c...) // and it stays so
	w.silent(mark, last.name+" ", rest...)
}

// oneWayLoss gives host 4 a wrong hardware address for host 5.
func oneWayLoss(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	w.ip(4, "neigh replace 10.77.0.5 lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
	time.Sleep(10 * time.Second)
	w.silent(mark, "", c...)
	w.agree(0, everybody(5), c...)
}

func udpBlocked(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	w.run(5, "iptables", "-A", "INPUT", "-p", "udp", "-s", "10.77.0.4", "-j", "DROP")
	w.run(5, "iptables", "-A", "OUTPUT", "-p", "udp", "-d", "10.77.0.4", "-j", "DROP")
	time.Sleep(10 * time.Second)
	w.silent(mark, "", c...)
	for i, a := range c {
		var warnings []string
		for _, l := range a.since(mark) {
			if strings.Contains(l.text, "[WARN]") {
				warnings = append(warnings, l.text)
			}
		}
		atEnd := i >= 3
		if atEnd && (len(warnings) != 1 || !strings.Contains(warnings[0], "10.77.0.4:7946") || !strings.Contains(warnings[0], "10.77.0.5:7946")) {
			w.Errorf("%s: want one warning that names both ends, have %q", a.name, warnings)
		} else if !atEnd && warnings != nil {
			w.Errorf("%s warns of what does not concern it: %q", a.name, warnings)
		}
	}
}

func tcpRejected(w *world) {
	c := w.cluster(4)
	w.run(5, "iptables", "-A", "INPUT", "-p", "tcp", "--dport", "7946", "-j", "REJECT", "--reject-with", "tcp-reset")
	c = append(c, w.start(5, "-join", "10.77.0.1"))
	w.agree(3*time.Second, everybody(5), c...)
	mark := time.Now()
	time.Sleep(10 * time.Second)
	w.silent(mark, "", c...)
	w.agree(0, everybody(5), c...)
}

func splitHeals(w *world) {
	c := w.cluster(8)
	w.split(5, 8)
	time.Sleep(cmp.Or(long(40*time.Second), 10*time.Second))
	w.agree(0, "n1:alive n2:alive n3:alive n4:alive n5:failed n6:failed n7:failed n8:failed", c[:4]...)
	w.agree(0, "n1:failed n2:failed n3:failed n4:failed n5:alive n6:alive n7:alive n8:alive", c[4:]...)
	mark := time.Now()
	w.heal(5, 8)
	w.agree(5*time.Second, everybody(8), c...)
	time.Sleep(2 * time.Second)
	for _, a := range c {
		if l := a.find(mark, "member-failed"); l != nil {
			w.Errorf("%s after the split: %s", a.name, l.text)
		}
	}
}

func twinsAfterASplit(w *world) {
	c := w.cluster(5)
	w.split(4, 6)
	w.agree(8*time.Second, "n1:failed n2:failed n3:failed n4:alive n5:alive", c[3:]...)
	twin := w.start(6, "-node", "n3", "-join", "10.77.0.4")
	w.agree(3*time.Second, "n1:failed n2:failed n3:alive n4:alive n5:alive", twin, c[3], c[4])
	mark := time.Now()
	w.heal(4, 6)
	if code := twin.exit(6 * time.Second); code != 1 {
		w.Errorf("the younger one exits with status %d", code)
	}
	if twin.find(mark, "10.77.0.3:7946") == nil {
		w.Errorf("the younger one does not name the holder's address")
	}
	w.agree(4*time.Second, everybody(5), c...)
	if got := c[4].member("n3").Addr; got != "10.77.0.3:7946" {
		w.Errorf("n3 is at %s", got)
	}
}

func restarts(w *world) {
	var files []string
	var c []*agent
	for i := range 5 {
		files = append(files, filepath.Join(w.TempDir(), fmt.Sprint("events", i+1)))
		c = append(c, w.start(i+1, "-join", "10.77.0.1", "-event-handler", `sed "s/^/$SERF_EVENT /" >>`+files[i]))
	}
	w.agree(5*time.Second, everybody(5), c...)
	for _, pause := range []time.Duration{50 * time.Millisecond, 0, 5 * time.Millisecond} {
		w.settle()
		for _, f := range files {
			os.Remove(f)
		}
		c[4].signal(syscall.SIGKILL)
		c[4].exit(5 * time.Second)
		time.Sleep(pause)
		c[4] = w.start(5, "-join", "10.77.0.1")
		w.agree(5*time.Second, everybody(5), c...)
		const want = "member-failed n5\t10.77.0.5\t\t\nmember-join n5\t10.77.0.5\t\t\n"
		for _, f := range files[:4] {
			read := func() string { b, _ := os.ReadFile(f); return string(b) }
			w.until(time.Second, func() string { return fmt.Sprintf("handlers saw %q", read()) }, func() bool { return read() == want })
		}
	}
}

func nameMoves(w *world) {
	c := w.cluster(5)
	w.ip(0, "link set h5 nomaster")
	old := c[4]
	c[4] = w.start(6, "-node", "n5", "-join", "10.77.0.1")
	moved := func(to string) func() bool {
		return func() bool {
			return !slices.ContainsFunc(c, func(a *agent) bool { return a.member("n5").Addr != to })
		}
	}
	took := w.until(6*time.Second, func() string { return "n5 has moved" }, moved("10.77.0.6:7946"))
	w.Logf("moved after %v", took)
	w.agree(time.Second, everybody(5), c...)
	time.Sleep(4 * time.Second)
	w.ip(0, "link set h5 master br0")
	w.oneOf(4*time.Second, old, c[4])
	w.agree(2*time.Second, everybody(5), c[:4]...)
}

// stalledHolder starts an agent under the name of one that is stopped.
func stalledHolder(w *world) {
	c := w.cluster(5)
	c[4].signal(syscall.SIGSTOP)
	newcomer := w.start(6, "-node", "n5", "-join", "10.77.0.1")
	time.Sleep(3 * time.Second)
	c[4].signal(syscall.SIGCONT)
	if code := newcomer.exit(4 * time.Second); code != 1 || newcomer.find(time.Time{}, "is taken: the member at 10.77.0.5:7946") == nil {
		w.Errorf("the newcomer exits with status %d", code)
	}
	w.agree(2*time.Second, everybody(5), c...)
	w.settle()
	mark := time.Now()
	time.Sleep(3 * time.Second)
	w.silent(mark, "", c[:4]...)
}

// unreachableAddress has a seed on two networks, whose members are on the one that it does not advertise.
func unreachableAddress(w *world) {
	w.ip(1, "address add 10.99.0.1/32 dev lo")
	c := []*agent{w.start(1, "-advertise", "10.99.0.1")}
	for i := 2; i <= 4; i++ {
		c = append(c, w.start(i, "-join", "10.77.0.1"))
	}
	time.Sleep(20 * time.Second)
	for _, a := range c {
		if n := a.count("member-failed"); n > 3 {
			w.Errorf("%s is told %d failures", a.name, n)
		}
		if a.count("[WARN]") != 1 || a.count("10.99.0.1:7946, which it advertises") != 1 && a.count("at 10.99.0.1:7946") == 0 {
			w.Errorf("%s warns %d times", a.name, a.count("[WARN]"))
		}
	}
}

// oneOf waits until one of two agents of one name gives way to the other.
func (w *world) oneOf(within time.Duration, a, b *agent) {
	w.Helper()
	select {
	case <-a.exited:
		a, b = b, a
	case <-b.exited:
	case <-time.After(within):
		w.Fatalf("both agents called %s live after %v", a.name, within)
	}
	if code := b.exit(time.Second); code != 1 || b.find(time.Time{}, "is taken: the member at ") == nil {
		w.Errorf("%s exits with status %d", b.name, code)
	}
	w.settle()
	if a.view() == "" {
		w.Errorf("%s on host %d has gone, too", a.name, a.host)
	}
}

func nameTaken(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	thief := w.spawn("", 6, "-node", "n5", "-join", "10.77.0.1")
	if code := thief.exit(3 * time.Second); code != 1 || thief.find(mark, "10.77.0.5:7946") == nil {
		w.Errorf("the newcomer exits with status %d", code)
	}
	w.Logf("gave up after %v", time.Since(mark))
	time.Sleep(time.Second)
	for _, a := range c {
		lines := slices.DeleteFunc(a.since(mark), func(l logLine) bool { return strings.Contains(l.text, "[WARN] two agents are called ") })
		if len(lines) > 0 {
			w.Errorf("%s logs %v", a.name, lines)
		}
	}
	for _, a := range []*agent{c[0], c[4]} { // the one that was asked, and the holder
		if n := a.count(`[WARN] two agents are called "n5", at 10.77.0.5:7946 and at 10.77.0.6:7946`); n != 1 {
			w.Errorf("%s warns %d times", a.name, n)
		}
	}
	w.agree(0, everybody(5), c...)
}

func twinsAtOnce(w *world) {
	c := w.cluster(2)
	for i, gap := range []time.Duration{0, 0, 3 * time.Millisecond, 30 * time.Millisecond} {
		name := fmt.Sprint("twin", i)
		mark := time.Now()
		twins := []*agent{w.spawn("", 3, "-node", name, "-join", "10.77.0.1")}
		time.Sleep(gap)
		twins = append(twins, w.spawn("", 4, "-node", name, "-join", "10.77.0.2"))
		w.until(2*time.Second, func() string { return "one of two gives way" }, func() bool {
			return twins[0].hasExited() || twins[1].hasExited()
		})
		w.settle()
		var living []*agent
		for _, a := range twins {
			if !a.hasExited() {
				living = append(living, a)
			} else if a.find(mark, `the name "`+name+`" is taken`) == nil {
				w.Errorf("%s at %d gives no reason", name, a.host)
			}
		}
		if len(living) != 1 {
			w.Fatalf("%d of two live", len(living))
		}
		// Where both got in at once, the wrong one may show until it has failed.
		for _, a := range c {
			took := w.until(3*time.Second, func() string {
				return fmt.Sprintf("%s shows the one on host %d, which lives, and not %v", a.name, living[0].host, a.member(name))
			}, func() bool {
				m := a.member(name)
				return m.Status == "alive" && m.Addr == fmt.Sprintf("10.77.0.%d:7946", living[0].host)
			})
			w.Logf("%s shows %s after %v more", a.name, name, took)
		}
		living[0].signal(syscall.SIGINT)
		living[0].exit(3 * time.Second)
	}
}

func reaped(w *world) {
	c := w.cluster(3, "-reap-after", "3s")
	mark := time.Now()
	c[2].signal(syscall.SIGKILL)
	first, _ := w.hear(6*time.Second, mark, "member-reap: n3 ", c[:2]...)
	if first < 3*time.Second {
		w.Errorf("forgotten after %v", first)
	}
	w.agree(time.Second, everybody(2), c[:2]...)
	time.Sleep(4 * time.Second) // also where one forgets later than another
	w.agree(0, everybody(2), c[:2]...)
	w.start(3, "-join", "10.77.0.1", "-reap-after", "3s")
	w.agree(2*time.Second, everybody(3), c[:2]...)
}

func addressReused(w *world) {
	c := w.cluster(5)
	mark := time.Now()
	c[4].signal(syscall.SIGKILL)
	c[4].exit(5 * time.Second)
	c[4] = w.start(5, "-node", "m5", "-join", "10.77.0.1")
	w.hear(time.Second, mark, "member-failed: n5 ", c[:4]...)
	w.agree(2*time.Second, "m5:alive n1:alive n2:alive n3:alive n4:alive n5:failed", c...)
	settled := time.Now()
	time.Sleep(4 * time.Second)
	w.agree(0, "m5:alive n1:alive n2:alive n3:alive n4:alive n5:failed", c...)
	w.silent(settled, "", c...)
}

func forceLeaves(w *world) {
	c := w.cluster(4)
	c[3].signal(syscall.SIGKILL)
	w.agree(2*time.Second, "n1:alive n2:alive n3:alive n4:failed", c[:3]...)
	if _, errs, code := c[0].run("force-leave", "n3"); code != 1 || !strings.Contains(errs, "alive") {
		w.Errorf("force-leave of a living member: status %d, %s", code, errs)
	}
	for _, step := range []struct{ args, want string }{
		{"n4", "n1:alive n2:alive n3:alive n4:left"},
		{"-prune n4", "n1:alive n2:alive n3:alive"},
	} {
		if _, errs, code := c[0].run("force-leave", strings.Fields(step.args)...); code != 0 {
			w.Errorf("force-leave %s: status %d, %s", step.args, code, errs)
		}
		w.agree(time.Second, step.want, c[:3]...)
		time.Sleep(2500 * time.Millisecond)
		w.agree(0, step.want, c[:3]...)
	}
	c[3] = w.start(4, "-join", "10.77.0.1")
	w.agree(2*time.Second, everybody(4), c...)
}

func leaveAlone(w *world) {
	c := w.cluster(4, "-leave-on-terminate")
	mark := time.Now()
	c[3].signal(syscall.SIGTERM)
	w.hear(time.Second, mark, "member-leave: n4 ", c[:3]...)
	if code := c[3].exit(2 * time.Second); code != 0 {
		w.Errorf("SIGTERM with -leave-on-terminate: exit status %d", code)
	}
	w.ip(0, "link set h1 nomaster", "link set h2 nomaster", "link set h3 nomaster")
	mark = time.Now()
	c[0].signal(syscall.SIGINT)
	if code := c[0].exit(3 * time.Second); code != 0 {
		w.Errorf("SIGINT: exit status %d", code)
	}
	w.Logf("left alone after %v", time.Since(mark))
	mark = time.Now()
	if _, errs, code := c[1].run("leave"); code != 0 {
		w.Errorf("leave: status %d, %s", code, errs)
	}
	c[1].exit(2500*time.Millisecond - time.Since(mark))
	w.Logf("the leave command took %v", time.Since(mark))
	c[2].signal(syscall.SIGINT)
	time.Sleep(2 * sameSignal)
	c[2].signal(syscall.SIGINT)
	if code := c[2].exit(3 * time.Second); code != 1 {
		w.Errorf("a second signal: exit status %d", code)
	}
}

func startOrder(w *world) {
	b := w.start(2, "-join", "10.77.0.1:7946")
	time.Sleep(1500 * time.Millisecond)
	a := w.start(1)
	w.agree(4*time.Second, everybody(2), a, b)
}

// With watchers that are met late each heartbeat once came later than promised, for ever: ten probes a second.
func lateSeed(w *world) {
	var c []*agent
	for host := 2; host <= 8; host++ {
		c = append(c, w.start(host, "-join", "10.77.0.1", "-log-level", "trace"))
	}
	time.Sleep(3 * time.Second)
	c = append(c, w.start(1, "-log-level", "trace"))
	w.agree(3*time.Second, everybody(8), c...)
	time.Sleep(4 * time.Second)
	mark := time.Now()
	time.Sleep(5 * time.Second)
	probes := 0
	for _, a := range c {
		for _, l := range a.since(mark) {
			if strings.Contains(l.text, "[TRACE] probing") {
				probes++
			}
		}
	}
	if probes > 10 { // a busy machine may be late
		w.Errorf("%d probes in 5 s", probes)
	}
}

func deadSeeds(w *world) {
	a := w.start(1)
	args := []string{"-join", "10.77.0.254"} // refuses
	for i := range 20 {
		args = append(args, "-join", fmt.Sprintf("10.77.0.%d", 100+i)) // nobody has these
	}
	b := w.start(2, append(args, "-join", "10.77.0.1")...)
	w.agree(2*time.Second, everybody(2), a, b)
}

func retryMax(w *world) {
	for _, seed := range []string{"10.77.0.254", "10.77.0.1"} { // one that refuses, and oneself
		mark := time.Now()
		a := w.spawn("", 1, "-join", seed, "-retry-max", "3")
		if code := a.exit(8 * time.Second); code != 1 || a.find(mark, "in 3 rounds") == nil {
			w.Errorf("seed %s: exit status %d", seed, code)
		}
		w.Logf("seed %s: gave up after %v", seed, time.Since(mark))
	}
}

func seedElsewhere(w *world) {
	w.ip(1, "addr add 10.77.0.201/24 dev eth0")
	a := w.start(1, "-advertise", "10.77.0.1")
	mark := time.Now()
	b := w.start(2, "-join", "10.77.0.201")
	w.agree(2*time.Second, everybody(2), a, b)
	told := func() (lines []string) {
		for _, l := range b.since(mark) {
			if strings.Contains(l.text, "[INFO]") && strings.Contains(l.text, "10.77.0.201") && strings.Contains(l.text, "10.77.0.1:7946") {
				lines = append(lines, l.text)
			}
		}
		return lines
	}
	eventually(w.T, "a line about the two addresses", func() bool { return len(told()) > 0 }) // once the tables are compared
	b.signal(syscall.SIGINT)
	b.exit(5 * time.Second)
	if lines := told(); len(lines) != 1 {
		w.Errorf("want one line about the two addresses, have %q", lines)
	}
}

func advertised(w *world) {
	// eth0 leads to the other hosts, eth1 to the rest of the world.
	two := []string{"link add eth1 type veth peer name far", "link set far up", "link set eth1 up", "addr add 192.168.5.2/24 dev eth1"}
	gateway := append(slices.Clone(two), "route add default via 192.168.5.1")
	bare := []string{"addr flush dev eth0"}
	only := func(addr string) []string { return append(slices.Clone(bare), "addr add "+addr+" dev eth0") }
	for _, c := range []struct {
		setup      []string
		args, want string
	}{
		{gateway, "-join 10.77.0.254", "'10.77.0.1:7946' (source address of the route to 10.77.0.254)"},
		{gateway, "-join no.such.host.invalid -join 10.77.0.254", "'10.77.0.1:7946' (source address of the route to 10.77.0.254)"},
		{gateway, "", "'192.168.5.2:7946' (source address of the default route)"},
		{gateway, "-iface eth0", "'10.77.0.1:7946' (address of eth0)"},
		{gateway, "-advertise 203.0.113.5:9000", "'203.0.113.5:9000' (set with -advertise)"},
		{gateway, "-advertise 203.0.113.5 -bind 0.0.0.0:8000", "'203.0.113.5:8000' (set with -advertise)"},
		{gateway, "-bind 10.77.0.1:8000", "'10.77.0.1:8000' (the bound address)"},
		{gateway, "-bind 10.77.0.1", "'10.77.0.1:7946' (the bound address)"},
		{gateway, "-bind [::]:7946 -join [fd77::254]", "'[fd77::1]:7946' (source address of the route to fd77::254)"},
		{two, "-join 203.0.113.1 -join 192.168.5.1", "'192.168.5.2:7946' (source address of the route to 192.168.5.1)"},
		{two, "", "'10.77.0.1:7946' (address of eth0)"},
		{only("100.64.3.4/10"), "", "'100.64.3.4:7946' (address of eth0)"},
		{only("203.0.113.7/24"), "", "'203.0.113.7:7946' (address of eth0)"},
		{only("fd77::1/64"), "-bind [::]:7946", "'[fd77::1]:7946' (address of eth0)"},
		{only("2a00:1::9/64"), "-bind [::]:7946", "'[2a00:1::9]:7946' (address of eth0)"},
		{bare, "", "'127.0.0.1:7946' (no other address was found)"},
		{[]string{"addr add 10.77.0.11/24 dev eth0"}, "-iface eth0 -bind 10.77.0.11:7946", "'10.77.0.11:7946' (the bound address, of eth0)"},
		{only("169.254.10.2/16"), "-join 169.254.10.1", "'169.254.10.2:7946' (source address of the route to 169.254.10.1)"},
		{only("169.254.10.3/16"), "", "'169.254.10.3:7946' (address of eth0)"},
		{[]string{"addr add 169.254.20.10/32 dev lo"}, "", "'10.77.0.1:7946' (address of eth0)"},
		{only("fd77::1/64"), "", "'[fd77::1]:7946' (address of eth0)"},
		{only("fd77::2/64 nodad"), "-join [fd77::254]:7946", "'[fd77::2]:7946' (source address of the route to fd77::254)"},
		{only("fd77::3/64 nodad"), "-join fe80::254%eth0", "'[fd77::3]:7946' (address of eth0)"},
		{gateway, "-join fd77::254", "'[fd77::1]:7946' (source address of the route to fd77::254)"},
		{gateway, "-advertise 2001:db8::5", "'[2001:db8::5]:7946' (set with -advertise)"},
	} {
		w.Run(c.args, func(t *testing.T) {
			w := newWorld(t, 1)
			w.ip(1, c.setup...)
			a := w.start(1, strings.Fields(c.args)...)
			a.signal(syscall.SIGTERM)
			a.exit(3 * time.Second) // now the log is complete
			if a.find(time.Time{}, "Advertise: "+c.want) == nil {
				t.Errorf("want %s, have\n%s", c.want, a.log(10))
			}
			if warns := a.find(time.Time{}, "is a public address") != nil; warns == (strings.Contains(c.want, "'10.") ||
				strings.Contains(c.want, "'192.168.") || strings.Contains(c.want, "'100.64.") || strings.Contains(c.want, "'169.254.") ||
				strings.Contains(c.want, "'[fd") || strings.Contains(c.want, "'127.")) {
				t.Errorf("warns of a public address: %v\n%s", warns, a.log(10))
			}
			if warns := a.find(time.Time{}, "[WARN] advertising 127.0.0.1:7946") != nil; warns != strings.Contains(c.want, "127.0.0.1") {
				t.Errorf("warns of a loopback address: %v\n%s", warns, a.log(10))
			}
		})
	}
}

// networkComesLate starts an agent on a machine that has no address yet.
func networkComesLate(w *world) {
	w.ip(2, "addr flush dev eth0")
	c := []*agent{w.start(1), w.start(2, "-join", "10.77.0.1")}
	time.Sleep(500 * time.Millisecond)
	w.ip(2, "addr add 10.77.0.2/24 dev eth0")
	w.agree(5*time.Second, everybody(2), c...)
	if got := c[0].member("n2").Addr; got != "10.77.0.2:7946" {
		w.Errorf("n2 told n1 the address %s", got)
	}
	time.Sleep(3 * time.Second)
	w.agree(0, everybody(2), c...)
}

func addressChanges(w *world, args ...string) {
	c := w.cluster(4, args...)
	mark := time.Now()
	w.ip(4, "addr del 10.77.0.4/24 dev eth0", "addr add 10.77.0.44/24 dev eth0")
	w.until(8*time.Second, func() string { return "all know the new address" }, func() bool {
		return !slices.ContainsFunc(c, func(a *agent) bool { return a.member("n4").Addr != "10.77.0.44:7946" })
	})
	w.Logf("the new address is known after %v", time.Since(mark))
	w.agree(3*time.Second, everybody(4), c...)
	w.silent(mark, "n4 ", c[:3]...)
	mark = time.Now()
	time.Sleep(4 * time.Second)
	w.silent(mark, "", c...)
}

func onlyIPv6(w *world) {
	var c []*agent
	for i := range 3 {
		w.ip(i+1, fmt.Sprintf("addr del 10.77.0.%d/24 dev eth0", i+1))
		bind := []string{"[::]:7946", fmt.Sprintf("[fd77::%d]:7946", i+1)}[i%2]
		c = append(c, w.start(i+1, "-bind", bind, "-join", "[fd77::1]:7946", "-join", "fd77::2"))
	}
	w.agree(3*time.Second, everybody(3), c...)
	w.settle()
	mark := time.Now()
	c[2].signal(syscall.SIGKILL)
	w.hear(600*time.Millisecond, mark, "member-failed: n3 ", c[:2]...)
	for _, a := range c[:2] {
		a.waitLine(memberLine("member-failed", "n3", "fd77::3"))
	}
}

// bothFamilies has two hosts with both families and, between the two, one that
// has only IPv4 and one that has only IPv6.
func bothFamilies(w *world) {
	w.ip(3, "addr del fd77::3/64 dev eth0")
	w.ip(4, "addr del 10.77.0.4/24 dev eth0")
	c := []*agent{
		w.start(1, "-bind", "[::]:7946", "-join", "10.77.0.2"),
		w.start(2, "-bind", "[::]:7946", "-join", "[fd77::1]"),
		w.start(3, "-join", "10.77.0.1"),
		w.start(4, "-bind", "[::]:7946", "-join", "[fd77::1]"),
	}
	w.agree(4*time.Second, everybody(4), c...)
	mark := time.Now()
	time.Sleep(6 * time.Second)
	w.silent(mark, "", c...)
	w.agree(0, everybody(4), c...)
}

func fullDisk(w *world) {
	c := w.cluster(2)
	full := w.spawn("exec >/dev/full 2>&1", 3, "-join", "10.77.0.1", "-log-level", "trace")
	c = append(c, full)
	w.agree(3*time.Second, everybody(3), c...)
	w.settle() // what was logged of that has been read
	mark := time.Now()
	time.Sleep(3 * time.Second)
	w.silent(mark, "", c...)
	w.agree(0, everybody(3), c...)
}

// fewDescriptors makes the seed of twenty agents do with 64 descriptors while
// strangers hold on to its ports.
func fewDescriptors(w *world) {
	seed := w.spawn("ulimit -n 64", 1, local(1)...)
	c := []*agent{seed}
	for i := 2; i <= 20; i++ {
		c = append(c, w.spawn("", 1, append(local(i), "-join", "127.0.0.1")...))
	}
	w.agree(10*time.Second, everybody(20), c...)
	w.settle()
	mark := time.Now()
	var conns []net.Conn
	w.inside(1, func() {
		for i := range 160 {
			if conn, err := net.DialTimeout("tcp", []string{"127.0.0.1:7946", "127.0.0.1:7373"}[i%2], time.Second); err == nil {
				conns = append(conns, conn)
			}
		}
	})
	time.Sleep(4 * time.Second)
	w.silent(mark, "", c...)
	for _, conn := range conns {
		conn.Close()
	}
	kill := time.Now()
	c[19].signal(syscall.SIGKILL)
	w.hear(1500*time.Millisecond, kill, "member-failed: n20 ", c[:19]...)
	w.agree(5*time.Second, strings.Replace(everybody(20), "n20:alive", "n20:failed", 1), c[:19]...)
	w.Logf("the seed says: %v", seed.since(mark))
}

func manyJoins(w *world) {
	n := cmp.Or(int(long(500)), 100)
	if underRace() {
		n = 30 // these agents need ten times the time
	}
	w.start(1, local(1)...)
	started := time.Now()
	for i := 2; i <= n+1; i++ {
		w.spawn("", 1, append(local(i), "-join", "127.0.0.1")...)
	}
	last := time.Now()
	want := everybody(n + 1)
	w.agree(cmp.Or(long(3*time.Minute), 20*time.Second), want, w.agents...)
	w.Logf("%d agents, started within %v, agree %v later", n, last.Sub(started), time.Since(last))
	mark := time.Now()
	time.Sleep(2 * time.Second)
	w.silent(mark, "", w.agents...)
}

// local gives agent i an address of its own on one host's loopback.
func local(i int) []string {
	ip := fmt.Sprintf("127.0.%d.%d", i/250, i%250)
	return []string{"-node", fmt.Sprint("n", i), "-bind", ip + ":7946", "-rpc-addr", ip + ":7373"}
}

// everybody is what n agents agree on when all is well.
func everybody(n int) string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("n%d", i+1))
	}
	slices.Sort(names)
	return strings.Join(names, ":alive ") + ":alive"
}

// long is v where LONG=1 asks for the whole length, 0 elsewhere.
func long[T ~int64 | ~int](v T) T {
	if os.Getenv("LONG") == "1" {
		return v
	}
	return 0
}

// ---- the world ----

// world is a switch and hosts 1 to n, which have the addresses 10.77.0.i and
// fd77::i; the switch has 254.
type world struct {
	*testing.T
	id     string
	hosts  int
	agents []*agent
	line   *line // instead of the switch, where hosts are far from each other
}

var worlds atomic.Int64

const nsPrefix = "hamlet-test-" // then the pid of the test, and a number

func needNamespaces(t *testing.T) {
	if testing.Short() {
		t.Skip("network namespaces: not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces: only root can make them")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("network namespaces: there is no ip command")
	}
	if lacking := namespacesLack(); lacking != "" && os.Getenv("CI") == "true" {
		t.Fatal(lacking) // where they are known to work
	} else if lacking != "" {
		t.Skip(lacking)
	}
}

// namespacesLack is what keeps tests from making namespaces, which one of them
// tries; "" is nothing.
var namespacesLack = sync.OnceValue(func() string {
	if setns == 0 {
		return "network namespaces: do not know how to enter one on " + runtime.GOARCH
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		return "network namespaces: there is no iptables command"
	}
	removeLeftovers()
	name := fmt.Sprint(nsPrefix, os.Getpid(), "-try")
	defer exec.Command("ip", "netns", "del", name).Run()
	for _, args := range []string{"netns add " + name, "-n " + name + " link add br0 type bridge", "-n " + name + " link add v type veth"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Sprintf("network namespaces: ip %s: %v: %s", args, err, out)
		}
	}
	return ""
})

// removeLeftovers removes what a test left behind that was killed.
func removeLeftovers() {
	names, _ := filepath.Glob("/run/netns/" + nsPrefix + "*")
	for _, name := range names {
		name = filepath.Base(name)
		pid, _, _ := strings.Cut(strings.TrimPrefix(name, nsPrefix), "-")
		if n, err := strconv.Atoi(pid); err == nil && syscall.Kill(n, 0) == syscall.ESRCH {
			exec.Command("ip", "netns", "del", name).Run()
		}
	}
}

func newWorld(t *testing.T, hosts int) *world {
	w := newHosts(t, hosts)
	wiring := []string{"link add br0 type bridge", "link add br1 type bridge", "link set br0 up", "link set br1 up",
		"addr add 10.77.0.254/24 dev br0", "addr add fd77::254/64 dev br0 nodad"}
	for i := 1; i <= hosts; i++ {
		wiring = append(wiring, fmt.Sprintf("link add h%d type veth peer name eth0 netns %s", i, w.ns(i)),
			fmt.Sprintf("link set h%d master br0 up", i))
	}
	w.ip(0, wiring...)
	for i := 1; i <= hosts; i++ {
		w.ip(i, "link set lo up", fmt.Sprintf("addr add 10.77.0.%d/24 dev eth0", i),
			fmt.Sprintf("addr add fd77::%d/64 dev eth0 nodad", i), "link set eth0 up")
	}
	return w
}

// newHosts makes the namespaces of a switch and its hosts, which nothing
// connects yet.
func newHosts(t *testing.T, hosts int) *world {
	w := &world{T: t, id: fmt.Sprint(nsPrefix, os.Getpid(), "-", worlds.Add(1)), hosts: hosts}
	t.Cleanup(w.destroy)
	var names []string
	for i := range hosts + 1 {
		names = append(names, "netns add "+w.ns(i))
	}
	w.ip(-1, names...)
	return w
}

func (w *world) destroy() {
	for i := range w.hosts + 1 {
		exec.Command("ip", "netns", "del", w.ns(i)).Run()
	}
}

func (w *world) ns(i int) string { return fmt.Sprint(w.id, "-", i) }

// ip runs ip commands on host ns; 0 is the switch, -1 this machine.
func (w *world) ip(ns int, lines ...string) {
	w.Helper()
	args := []string{"-batch", "-"}
	if ns >= 0 {
		args = append([]string{"-n", w.ns(ns)}, args...)
	}
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// split moves the hosts from to last to another switch, heal moves them back.
func (w *world) split(from, last int) { w.plug(from, last, "br1") }
func (w *world) heal(from, last int)  { w.plug(from, last, "br0") }

func (w *world) plug(from, last int, bridge string) {
	var lines []string
	for i := from; i <= last; i++ {
		lines = append(lines, fmt.Sprintf("link set h%d master %s", i, bridge))
	}
	w.ip(0, lines...)
}

var setns = map[string]uintptr{"amd64": 308, "arm64": 268}[runtime.GOARCH] // the system call's number

// inside runs f on a thread that is on the host: sockets and processes that f
// makes are there. The thread is locked before anything is read of it: else
// home could be where another test has just taken it.
func (w *world) inside(host int, f func()) {
	w.Helper()
	runtime.LockOSThread() // after a failure the thread stays locked and ends with the test
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		w.Fatal(err)
	}
	defer home.Close()
	there, err := os.Open("/run/netns/" + w.ns(host))
	if err != nil {
		w.Fatal(err)
	}
	defer there.Close()
	if _, _, e := syscall.RawSyscall(setns, there.Fd(), syscall.CLONE_NEWNET, 0); e != 0 {
		w.Fatalf("setns: %v", e)
	}
	f()
	if _, _, e := syscall.RawSyscall(setns, home.Fd(), syscall.CLONE_NEWNET, 0); e != 0 {
		w.Fatalf("setns: %v", e)
	}
	runtime.UnlockOSThread()
}

// run runs a command that must succeed on the host.
func (w *world) run(host int, name string, args ...string) {
	w.Helper()
	if out, errs, code := w.on(host).run(w.T, exec.Command(name, args...)); code != 0 {
		w.Fatalf("%s %s: %s%s", name, strings.Join(args, " "), out, errs)
	}
}

// on is the host as a place for processes.
func (w *world) on(host int) place { return func(start func()) { w.inside(host, start) } }

// spawn starts an agent, from a shell after prelude if there is one. Its name
// is n and the host's number unless args tell another.
func (w *world) spawn(prelude string, host int, args ...string) *agent {
	w.Helper()
	name, rpc := fmt.Sprint("n", host), defaultRPC
	for i, arg := range args {
		switch arg {
		case "-node":
			name = args[i+1]
		case "-rpc-addr":
			rpc = args[i+1]
		}
	}
	cmd := hamletCmd(append([]string{"agent", "-node", name}, args...)...)
	if prelude != "" {
		env := cmd.Env
		cmd = exec.Command("sh", append([]string{"-c", prelude + `; exec "$0" "$@"`}, cmd.Args...)...)
		cmd.Env = env
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	a := launch(w.T, cmd, w.on(host))
	a.host, a.name, a.rpc = host, name, rpc
	w.agents = append(w.agents, a)
	return a
}

// start starts an agent and waits until it runs.
func (w *world) start(host int, args ...string) *agent {
	w.Helper()
	a := w.spawn("", host, args...)
	a.waitBanner()
	return a
}

// cluster starts agents on hosts 1 to n, which join the first.
func (w *world) cluster(n int, args ...string) (c []*agent) {
	w.Helper()
	for i := range n {
		c = append(c, w.start(i+1, append([]string{"-join", "10.77.0.1"}, args...)...))
	}
	w.agree(5*time.Second, everybody(n), c...)
	w.settle()
	return c
}

// settle lets links and log lines that are under way arrive.
func (w *world) settle() { time.Sleep(500 * time.Millisecond) }

// ---- expectations ----

// until waits for ok; what describes what it waits for.
func (w *world) until(within time.Duration, what func() string, ok func() bool) time.Duration {
	w.Helper()
	within *= busy
	start := time.Now()
	for !ok() {
		if time.Since(start) >= within {
			w.Fatalf("not within %v: %s", within, what())
		}
		time.Sleep(pause)
	}
	return time.Since(start)
}

// agree waits until all members commands show want.
func (w *world) agree(within time.Duration, want string, as ...*agent) {
	w.Helper()
	start := time.Now()
	for _, a := range as {
		for have := a.view(); have != want; have = a.view() {
			if time.Since(start) >= within {
				w.Fatalf("after %v %s shows\n%s, want\n%s", within, a.name, have, want)
			}
			time.Sleep(pause)
		}
	}
	if within > 0 {
		w.Logf("%d agree on %.60s after %v", len(as), want, time.Since(start).Round(time.Millisecond))
	}
}

// hear waits until all have logged text, and returns when the first and the
// last did, counted from mark.
func (w *world) hear(within time.Duration, mark time.Time, text string, as ...*agent) (first, last time.Duration) {
	w.Helper()
	first = time.Hour
	for _, a := range as {
		w.until(within-time.Since(mark), func() string { return fmt.Sprintf("%s logs %q", a.name, text) },
			func() bool { return a.find(mark, text) != nil })
		at := a.find(mark, text).at.Sub(mark)
		first, last = min(first, at), max(last, at)
	}
	if last > within*busy {
		w.Errorf("%q within %v, not %v", text, last, within)
	}
	w.Logf("%q: first %v, last of %d %v", text, first.Round(time.Millisecond), len(as), last.Round(time.Millisecond))
	return first, last
}

// silent demands that since mark nobody has logged anything about a member,
// except about the one whose name begins with but.
func (w *world) silent(mark time.Time, but string, as ...*agent) {
	w.Helper()
	for _, a := range as {
		for _, l := range a.since(mark) {
			if _, about, ok := strings.Cut(l.text, "] member-"); ok && (but == "" || !strings.Contains(about, ": "+but)) {
				w.Errorf("%s logs %s", a.name, l.text)
			}
		}
	}
}
