//go:build linux

// bench_test.go: what agents take and how fast they are, measured.
//
// TestBench (make bench) starts real agents as processes on loopback, reads the
// log lines of all of them as they come, and prints a table. With PEER it does
// the same in turn with another binary that takes Serf's command line. A step
// that does not happen fails the run; no figure is made up for it. BENCH_ROWS
// chooses among the rows of benchParts.

package test

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"
)

// benchParts are measured one after the other, each with every contender. rows
// are what BENCH_ROWS, a pattern, chooses among.
var benchParts = []struct {
	name, rows string
	run        func(t *testing.T, c *contender, n int)
}{
	{"many", "size join idle members event kill address", benchMany},
	{"asking", "tags query", benchAsking},
	{"few", "terminate handler stop", benchSome},
	{"late", "late-rest late-seed", benchLateSeeds},
	{"far", "far-rest far-join far-slow far-fail far-nemesis", benchFar},
}

const (
	benchFew      = 8                // agents where few will do
	benchPatience = 60 * time.Second // with whatever shall happen
	benchSettle   = 15 * time.Second // after the joins, before the idle window
	benchIdle     = 30 * time.Second
	benchStop     = 8 * time.Second
	benchRest     = 20 * time.Second // after the last thing that happened
	benchSeedLate = 3 * time.Second
	benchLate     = 5 * time.Second // for a verdict about one that goes on again
)

func TestBench(t *testing.T) {
	if os.Getenv("BENCH") != "1" {
		t.Skip("takes minutes and wants a quiet machine: 'make bench' runs it")
	}
	where := "on the host's lo, WHERE OTHERS COUNT TOO"
	if os.Getenv("BENCH_INSIDE") == "1" {
		where = "alone in a network namespace"
	} else if benchInside(t) {
		return
	}
	n := envInt("BENCH_N", 50)
	if n < 5 || n > 10000 {
		t.Fatalf("BENCH_N is %d, want 5 to 10000", n)
	}
	endAgentsWhenStopped()
	table := &benchTable{figures: make(map[string]*[2][]float64)}
	table.benched = append(table.benched, &contender{benchTable: table, name: "hamlet", path: program})
	if peer := os.Getenv("PEER"); peer != "" {
		path, err := exec.LookPath(peer)
		if err != nil {
			t.Fatalf("PEER: %v", err)
		}
		table.benched = append(table.benched, &contender{benchTable: table, name: "peer", path: path, i: 1})
	}
	fmt.Printf("N=%d, %d CPUs, load %.4s, %s, %s\n", n, runtime.NumCPU(), readFile("/proc/loadavg"), runtime.Version(), where)
	for _, part := range benchParts {
		for _, c := range table.benched {
			if slices.ContainsFunc(strings.Fields(part.rows), benchWants) {
				t.Run(part.name+"/"+c.name, func(t *testing.T) { part.run(t, c, n) })
			}
		}
	}
	for _, c := range table.benched {
		c.put("living members called failed, in all of this", float64(len(c.wrong)))
		for _, w := range c.wrong {
			fmt.Println("wrong:", w)
		}
	}
	table.print()
}

// benchWants reports whether BENCH_ROWS, which matches whole names, has a row.
func benchWants(row string) bool {
	rows := os.Getenv("BENCH_ROWS")
	return rows == "" || regexp.MustCompile("^(?:"+rows+")$").MatchString(row)
}

// benchInside runs the test once more in network and process namespaces of its
// own: there nothing else counts on lo, and whatever happens, all agents end
// with the run. It reports whether there are such namespaces.
func benchInside(t *testing.T) bool {
	spaces := []string{"-n", "-p", "-f", "--kill-child", "--mount-proc"}
	if os.Getuid() != 0 {
		spaces = append(spaces, "-r")
	}
	if out, err := exec.Command("unshare", append(spaces, "ip", "link", "set", "lo", "up")...).CombinedOutput(); err != nil {
		fmt.Printf("no namespace to measure in: %v %s\n", err, out)
		return false
	}
	self, _ := os.Executable()
	cmd := exec.Command("unshare", append(spaces, "sh", "-c", `ip link set lo up && cd test && { mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns; exec "$0" "$@"; }`, self, "-test.run=^TestBench$")...)
	if end, ok := t.Deadline(); ok {
		cmd.Args = append(cmd.Args, "-test.timeout="+(time.Until(end)-time.Second).String())
	}
	cmd.Env = append(os.Environ(), "BENCH_INSIDE=1", "HAMLET="+program)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // when it closes, the run inside ends
		t.Fatal(err)
	}
	if err := cmd.Run(); err != nil {
		t.Fatalf("the run in the namespace: %v", err)
	}
	return true
}

// endAgentsWhenStopped keeps an interrupted run from leaving agents behind.
func endAgentsWhenStopped() {
	stopped := make(chan os.Signal, 1)
	signal.Notify(stopped, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	if os.Getenv("BENCH_INSIDE") == "1" {
		go func() { io.Copy(io.Discard, os.Stdin); stopped <- syscall.SIGHUP }()
	}
	go func() {
		<-stopped
		benchGroups.Range(func(pgid, _ any) bool { syscall.Kill(-pgid.(int), syscall.SIGKILL); return true })
		os.Exit(1)
	}()
}

// ---- the table ----

type benchTable struct {
	benched []*contender
	labels  []string
	figures map[string]*[2][]float64
}

// contender is a binary, and one column of the table.
type contender struct {
	*benchTable
	i          int
	name, path string
	wrong      []string // log lines that call a living member failed
}

// put notes figures, for the table.
func (c *contender) put(label string, figures ...float64) {
	if c.figures[label] == nil {
		c.figures[label] = new([2][]float64)
		c.labels = append(c.labels, label)
	}
	c.figures[label][c.i] = figures
	fmt.Printf("%s: %s: %s\n", c.name, label, cell(figures))
}

// putTimes notes what took ds: the middle, and the far end.
func (c *contender) putTimes(label string, ds []time.Duration) {
	label += fmt.Sprintf(" (of %d: p50 / p99 / max, ms)", len(ds))
	c.put(label, inMs(percentile(ds, .5)), inMs(percentile(ds, .99)), inMs(slices.Max(ds)))
}

const never = time.Duration(math.MaxInt64)

func inMs(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (b *benchTable) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 4, ' ', 0)
	fmt.Fprint(w, "\nwhat\thamlet")
	if len(b.benched) > 1 {
		fmt.Fprint(w, "\tpeer\tpeer : hamlet")
	}
	for _, l := range b.labels {
		ours, theirs := b.figures[l][0], b.figures[l][1]
		fmt.Fprintf(w, "\n%s\t%s", l, cell(ours))
		if len(b.benched) > 1 {
			var ratios []float64
			for i := range min(len(ours), len(theirs)) {
				if ours[i] > 0 && max(ours[i], theirs[i]) < inMs(never) {
					ratios = append(ratios, theirs[i]/ours[i])
				}
			}
			fmt.Fprintf(w, "\t%s\t%s", cell(theirs), cell(ratios))
		}
	}
	fmt.Fprintln(w)
	w.Flush()
}

func cell(figures []float64) string {
	var words []string
	for _, f := range figures {
		switch {
		case f >= inMs(never):
			words = append(words, "never")
		case f >= 100:
			words = append(words, fmt.Sprintf("%.0f", f))
		default:
			words = append(words, fmt.Sprintf("%.3g", f))
		}
	}
	return cmp.Or(strings.Join(words, " / "), "-")
}

// ---- agents ----

// benchCluster is some agents of one binary, with those who wait for what the
// agents log.
type benchCluster struct {
	t        *testing.T
	c        *contender
	net      int    // the third byte of the agents' addresses
	far      *world // where its hosts are, if not here
	seed     int    // the agent that all others join
	join     string // by this option
	agents   []*benchAgent
	deadline time.Time
	probes   atomic.Int64  // as far as agents tell of them
	broken   chan struct{} // an agent has ended that should not have
	why      error

	mu      sync.Mutex
	watches []*benchWatch
	blamed  map[string]bool // those that may end, and be called failed
	cut     map[string]bool // those that may call any member failed
	closing bool
}

type benchAgent struct {
	name, ip string
	rpc      string
	at       place
	cmd      *exec.Cmd
	last     []string
	ended    chan struct{}
}

// sighting is one agent's log line about a member or a user event.
type sighting struct {
	at       time.Time
	by       string
	kind     string // join, leave, failed ...; user; up for an agent's own join
	name, ip string
}

var (
	benchNets   int
	benchGroups sync.Map // the process groups of all agents
)

// benchLine is what hamlet, Serf's library and Serf's agent log of an event.
var benchLine = regexp.MustCompile(`\[(?:INFO|WARN)\] (?:serf: |agent: Received event: )?(?:EventMember|member-|(user)-event)([A-Za-z]*): (\S+)(?: (\S+))?`)

func newBenchCluster(t *testing.T, c *contender) *benchCluster {
	benchNets++
	cl := &benchCluster{t: t, c: c, net: benchNets, join: "-join", blamed: make(map[string]bool), cut: make(map[string]bool), broken: make(chan struct{})}
	cl.deadline = time.Now().Add(time.Hour)
	if end, ok := t.Deadline(); ok {
		cl.deadline = end.Add(-10 * time.Second) // so that the clean-up still runs
	}
	t.Cleanup(func() {
		cl.mu.Lock()
		cl.closing = true
		cl.mu.Unlock()
		for _, a := range cl.agents {
			a.signal(syscall.SIGKILL)
		}
		for _, a := range cl.agents {
			<-a.ended
		}
	})
	return cl
}

// address is that of the i-th agent. Every cluster has a net, so that nobody
// speaks to those of the cluster before.
func (cl *benchCluster) address(i int) string {
	if cl.far != nil {
		return fmt.Sprintf("10.77.0.%d", i+1)
	}
	return fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%100+i/250, cl.net, 1+i%250)
}

// start starts the i-th agent, which joins the seed. It is in a process group
// of its own, as PEER may be a script that runs the agent.
func (cl *benchCluster) start(i int, ip string, options ...string) *benchAgent {
	cl.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		cl.t.Fatal(err)
	}
	a := &benchAgent{name: "n" + strconv.Itoa(i), ip: ip, rpc: ip + ":7373", at: here, ended: make(chan struct{})}
	if cl.far != nil {
		a.rpc, a.at = defaultRPC, cl.far.on(i+1)
	}
	a.cmd = exec.Command(cl.c.path, "agent", "-node="+a.name, "-bind="+ip+":7946", "-rpc-addr="+a.rpc, "-log-level=info")
	if i != cl.seed {
		a.cmd.Args = append(a.cmd.Args, cl.join+"="+cl.address(cl.seed)+":7946")
	}
	a.cmd.Args = append(a.cmd.Args, options...)
	a.cmd.Stdout, a.cmd.Stderr = w, w // Serf logs to stdout
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	a.at(func() { err = a.cmd.Start() })
	w.Close()
	if err != nil {
		cl.t.Fatalf("cannot start %s: %v", cl.c.path, err)
	}
	benchGroups.Store(a.cmd.Process.Pid, true)
	cl.agents = slices.Replace(cl.agents, i, min(i+1, len(cl.agents)), a)
	go cl.follow(a, r)
	return a
}

func (a *benchAgent) signal(s syscall.Signal) {
	if _, ok := benchGroups.Load(a.cmd.Process.Pid); ok {
		syscall.Kill(-a.cmd.Process.Pid, s)
	}
}

// follow reads an agent's output until it ends.
func (cl *benchCluster) follow(a *benchAgent, r *os.File) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		cl.line(a, time.Now(), lines.Text())
	}
	r.Close()
	err := a.cmd.Wait()
	benchGroups.Delete(a.cmd.Process.Pid)
	cl.mu.Lock()
	defer cl.mu.Unlock()
	if !cl.blamed[a.name] && !cl.closing && cl.why == nil {
		cl.why = fmt.Errorf("agent %s has ended by itself (%v); its last lines:\n%s", a.name, err, strings.Join(a.last, "\n"))
		close(cl.broken)
	}
	close(a.ended)
}

func (cl *benchCluster) line(a *benchAgent, at time.Time, line string) {
	if strings.Contains(line, "[TRACE] probing ") {
		cl.probes.Add(1)
	}
	m := benchLine.FindStringSubmatch(line)
	cl.mu.Lock()
	defer cl.mu.Unlock()
	a.last = append(a.last[max(len(a.last)-9, 0):], line)
	if m == nil || cl.closing {
		return
	}
	ip, _, _ := strings.Cut(m[4], ":")
	s := sighting{at, a.name, strings.ToLower(m[1] + m[2]), m[3], ip}
	switch {
	case s.kind == "join" && s.name == s.by:
		s.kind = "up"
	case s.kind == "failed" && !cl.blamed[s.name] && !cl.cut[s.by]:
		cl.c.wrong = append(cl.c.wrong, s.by+" says: "+line)
	}
	for _, w := range cl.watches {
		w.saw(s)
	}
}

// benchWatch collects the first sightings, by agent and member, that are like
// the given one; what is empty there is like anything.
type benchWatch struct {
	cl      *benchCluster
	like    sighting
	want    int
	seen    map[string]bool
	times   []time.Time
	reached chan struct{} // as many as wanted are there
}

func (cl *benchCluster) watch(want int, like sighting) *benchWatch {
	w := &benchWatch{cl: cl, like: like, want: want, seen: make(map[string]bool), reached: make(chan struct{})}
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.watches = append(cl.watches, w)
	return w
}

func (w *benchWatch) saw(s sighting) {
	is := func(got, like string) bool { return like == "" || got == like }
	if !is(s.kind, w.like.kind) || !is(s.by, w.like.by) || !is(s.name, w.like.name) || !is(s.ip, w.like.ip) || w.seen[s.by+" "+s.name] {
		return
	}
	w.seen[s.by+" "+s.name] = true
	if w.times = append(w.times, s.at); len(w.times) == w.want {
		close(w.reached)
	}
}

// wait waits for as many sightings as wanted and returns when the first and
// the last of them were made.
func (w *benchWatch) wait() (first, last time.Time, err error) { return w.within(benchPatience) }

func (w *benchWatch) within(patience time.Duration) (first, last time.Time, err error) {
	patience = min(patience, time.Until(w.cl.deadline))
	select {
	case <-w.reached:
	case <-w.cl.broken:
		err = w.cl.why
	case <-time.After(patience):
		err = fmt.Errorf("not within %v", patience.Round(time.Second))
	}
	w.cl.mu.Lock()
	defer w.cl.mu.Unlock()
	if err != nil {
		return first, last, fmt.Errorf("%d of %d: %w", len(w.times), w.want, err)
	}
	times := slices.SortedFunc(slices.Values(w.times[:w.want]), time.Time.Compare)
	return times[0], times[w.want-1], nil
}

// must is wait for what has to happen.
func (w *benchWatch) must(format string, a ...any) (first, last time.Time) {
	w.cl.t.Helper()
	first, last, err := w.wait()
	if err != nil {
		w.cl.t.Fatalf("did not happen: "+format+": %v", append(a, err)...)
	}
	return first, last
}

// startAll starts n agents as fast as it can and returns how long after the
// last start all knew all. options are those of the i-th; nil: none.
func (cl *benchCluster) startAll(n int, options func(i int) []string) time.Duration {
	if options == nil {
		options = func(int) []string { return nil }
	}
	up := cl.watch(1, sighting{kind: "up"})
	all := cl.watch(n*(n-1), sighting{kind: "join"})
	cl.start(0, cl.address(0), options(0)...)
	up.must("the first agent starts")
	for i := 1; i < n; i++ {
		cl.start(i, cl.address(i), options(i)...)
	}
	began := time.Now()
	_, last := all.must("all %d agents see all others join", n)
	return max(last.Sub(began), 0)
}

// blame says whether an agent may end and be called failed.
func (cl *benchCluster) blame(a *benchAgent, may bool) {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.blamed[a.name] = may
}

// end ends an agent by a signal and returns when that was.
func (cl *benchCluster) end(a *benchAgent, s syscall.Signal) time.Time {
	cl.blame(a, true)
	at := time.Now()
	a.signal(s)
	return at
}

// restart starts the i-th agent, which was told to end, anew; it and all others
// of n must see each other. Some time passes, as crashes befall a steady state.
func (cl *benchCluster) restart(i, n int) {
	cl.t.Helper()
	old := cl.agents[i]
	select {
	case <-old.ended:
	case <-time.After(benchPatience):
		cl.t.Fatalf("did not happen: %s ends", old.name)
	}
	seen := cl.watch(n-1, sighting{kind: "join", name: old.name})
	sees := cl.watch(n-1, sighting{kind: "join", by: old.name})
	cl.start(i, old.ip)
	if _, _, err := seen.wait(); err != nil && cl.c.i == 1 {
		fmt.Printf("peer: not all see that %s is back: %v\n", old.name, err) // some had not seen it go
	} else if err != nil {
		cl.t.Fatalf("did not happen: all see that %s is back: %v", old.name, err)
	}
	sees.must("%s, which is back, sees all", old.name)
	cl.blame(old, false)
	time.Sleep(time.Second)
}

func (cl *benchCluster) run(a *benchAgent, command string, args ...string) string {
	cl.t.Helper()
	out, errs, code := a.at.run(cl.t, exec.Command(cl.c.path, append([]string{command, "-rpc-addr=" + a.rpc}, args...)...))
	if code != 0 {
		cl.t.Fatalf("did not happen: %s at %s: exit status %d\n%s%s", command, a.name, code, out, errs)
	}
	return out
}

// ---- what is measured on many agents ----

func benchMany(t *testing.T, c *contender, n int) {
	b, err := os.ReadFile(c.path)
	if err != nil {
		t.Fatal(err)
	}
	isScript := bytes.HasPrefix(b, []byte("#!")) // the size of one says nothing
	if benchWants("size") && !isScript {
		c.put("binary, MB", float64(len(b))/1e6)
	}

	var joins []time.Duration
	for range 5 {
		if benchWants("join") {
			t.Run("join", func(t *testing.T) { joins = append(joins, newBenchCluster(t, c).startAll(n, nil)) })
		}
	}
	cl := newBenchCluster(t, c)
	joins = append(joins, cl.startAll(n, nil))
	if benchWants("join") {
		c.putTimes(fmt.Sprintf("%d agents joining one, started at once: converged after the last start", n), joins)
	}

	for _, row := range []struct {
		name    string
		measure func(n int)
	}{{"idle", cl.idle}, {"members", cl.members}, {"event", cl.events}, {"kill", cl.kills}, {"address", cl.newAddress}} {
		if benchWants(row.name) {
			row.measure(n)
		}
	}
}

// idle lets the cluster idle and takes what that costs.
func (cl *benchCluster) idle(n int) {
	time.Sleep(benchSettle)
	cpu0, _ := cl.usage(n)
	each := float64(n) * cl.traffic(fmt.Sprintf("idle, N=%d", n), n, benchIdle).Seconds()
	cpu1, rss := cl.usage(n)
	cl.c.put(fmt.Sprintf("idle, N=%d: CPU a second an agent, ms", n), inMs(cpu1-cpu0)/each)
	cl.c.put(fmt.Sprintf("resident memory, N=%d (p50 / max), MB", n), rss[n/2], rss[n-1])
}

// traffic takes what n agents send in a window, and how often they probe each
// other, and returns how long the window was.
func (cl *benchCluster) traffic(label string, n int, window time.Duration) time.Duration {
	cl.t.Helper()
	began := time.Now()
	bytes0, packets0 := cl.sent()
	probes0 := cl.probes.Load()
	time.Sleep(window)
	bytes1, packets1 := cl.sent()
	probes := cl.probes.Load() - probes0
	took := time.Since(began)

	each := float64(n) * took.Seconds()
	cl.c.put(label+": bytes a second an agent", (bytes1-bytes0)/each)
	cl.c.put(label+": packets a second an agent", (packets1-packets0)/each)
	if probes > 0 {
		cl.c.put(label+": probes a second, all agents", float64(probes)/took.Seconds())
	}
	return took
}

// sent is what all agents have sent so far, IP headers included.
func (cl *benchCluster) sent() (bytes, packets float64) {
	cl.t.Helper()
	if cl.far == nil {
		return loTraffic(cl.t)
	}
	for i := range cl.agents {
		p, b := cl.far.line.sent(i + 1)
		packets += p
		bytes += b
	}
	return bytes, packets
}

// loTraffic is what has gone over lo so far, IP headers included.
func loTraffic(t *testing.T) (bytes, packets float64) {
	_, lo, _ := strings.Cut(readFile("/proc/net/dev"), "lo:")
	if _, err := fmt.Sscan(lo, &bytes, &packets); err != nil || packets == 0 {
		t.Fatal("/proc/net/dev does not say what lo carries")
	}
	return bytes, packets
}

// usage is the CPU time of all agents so far, and each one's memory in MB.
func (cl *benchCluster) usage(n int) (cpu time.Duration, rss []float64) {
	cl.t.Helper()
	memory := make(map[int]float64) // of an agent with the script that runs it
	for _, p := range procStats() {
		if !slices.ContainsFunc(cl.agents, func(a *benchAgent) bool { return a.cmd.Process.Pid == p.pgid }) {
			continue
		}
		dir := fmt.Sprintf("/proc/%d/", p.pid)
		threads, _ := filepath.Glob(dir + "task/*/schedstat")
		for _, f := range threads {
			var ns time.Duration
			fmt.Sscan(readFile(f), &ns)
			cpu += ns
		}
		var size, resident float64 // pages
		fmt.Sscan(readFile(dir+"statm"), &size, &resident)
		memory[p.pgid] += resident * float64(os.Getpagesize()) / 1e6
	}
	rss = slices.Sorted(maps.Values(memory))
	if len(rss) != n || cpu == 0 || rss[0] == 0 {
		cl.t.Fatalf("/proc tells of %d of %d agents, and of %v of CPU time", len(rss), n, cpu)
	}
	return cpu, rss
}

func (cl *benchCluster) members(n int) {
	var took []time.Duration
	for range 30 {
		began := time.Now()
		out := cl.run(cl.agents[1], "members")
		took = append(took, time.Since(began))
		if got := strings.Count(out, "alive"); got != n {
			cl.t.Fatalf("members has %d of %d alive:\n%s", got, n, out)
		}
	}
	cl.c.putTimes(fmt.Sprintf("members as a process, N=%d", n), took)
}

// events sends ten user events a second, from one agent after the other.
func (cl *benchCluster) events(n int) {
	var spread []time.Duration
	for i := range 50 {
		next := time.After(100 * time.Millisecond)
		name := fmt.Sprintf("bench%d", i)
		all := cl.watch(n, sighting{kind: "user", name: name})
		cl.run(cl.agents[i%n], "event", "-coalesce=false", name)
		first, last := all.must("event %s reaches all", name)
		spread = append(spread, last.Sub(first))
		<-next
	}
	cl.c.putTimes(fmt.Sprintf("user event, N=%d: first to last agent", n), spread)
}

func (cl *benchCluster) kills(n int) {
	var first, every []time.Duration
	for k := range 10 {
		i := 1 + k*(n-1)/10
		failed := cl.watch(n-1, sighting{kind: "failed", name: cl.agents[i].name})
		at := cl.end(cl.agents[i], syscall.SIGKILL)
		one, all := failed.must("all say that %s has failed", cl.agents[i].name)
		first, every = append(first, one.Sub(at)), append(every, all.Sub(at))
		cl.restart(i, n)
	}
	cl.c.putTimes(fmt.Sprintf("kill -9, N=%d: first peer says failed", n), first)
	cl.c.putTimes(fmt.Sprintf("kill -9, N=%d: every peer says failed", n), every)
}

// newAddress kills agents and starts them at once at another address. That a
// peer cannot do it is a figure, too.
func (cl *benchCluster) newAddress(n int) {
	label := fmt.Sprintf("same name restarted at a new address, N=%d: all show it", n)
	var took []time.Duration
	for k := range 3 {
		ip, i := cl.address(n+k), 1+k
		name := cl.agents[i].name
		all := cl.watch(n-1, sighting{kind: "join", name: name, ip: ip})
		cl.end(cl.agents[i], syscall.SIGKILL)
		began := time.Now()
		cl.start(i, ip)
		_, last, err := all.wait()
		if err != nil && cl.c.i == 0 {
			cl.t.Fatalf("did not happen: all show %s at %s: %v", name, ip, err)
		} else if err != nil {
			fmt.Printf("%s: %s: %v\n", cl.c.name, label, err)
			took = slices.Repeat([]time.Duration{never}, 3)
			break
		}
		took = append(took, last.Sub(began))
		time.Sleep(time.Second)
	}
	cl.c.putTimes(label, took)
}

// ---- questions, and tags at run time ----

func benchAsking(t *testing.T, c *contender, n int) {
	cl := newBenchCluster(t, c)
	cl.startAll(n, func(int) []string { return []string{"-event-handler=query:bench=echo here"} })
	time.Sleep(2 * time.Second)
	if benchWants("tags") {
		cl.tags(n)
	}
	if benchWants("query") {
		cl.queries(n)
	}
}

// tags changes a tag of one agent after the other.
func (cl *benchCluster) tags(n int) {
	var took []time.Duration
	for k := range 30 {
		i, next := k%n, time.After(100*time.Millisecond)
		all := cl.watch(n-1, sighting{kind: "update", name: cl.agents[i].name})
		began := time.Now()
		cl.run(cl.agents[i], "tags", "-set", fmt.Sprintf("bench=%d", k))
		_, last := all.must("all see the tags of %s change", cl.agents[i].name)
		took = append(took, last.Sub(began))
		<-next
	}
	cl.c.putTimes(fmt.Sprintf("tags -set, N=%d: from the command's start until every peer knows", n), took)
}

// queries asks all agents, and waits for the answers and for the command's end.
func (cl *benchCluster) queries(n int) {
	var answers, ends []time.Duration
	missed := 0
	for k := range 5 {
		began, count := time.Now(), 0
		a := cl.agents[k%n]
		cmd := exec.Command(cl.c.path, "query", "-rpc-addr="+a.rpc, "bench")
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			cl.t.Fatalf("cannot run %v: %v", cmd, err)
		}
		last := time.Duration(0)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "Response from ") {
				last, count = time.Since(began), count+1
			}
		}
		if err := cmd.Wait(); cl.c.i == 0 && (err != nil || count != n) {
			cl.t.Fatalf("did not happen: all answer a query: %d of %d: %v", count, n, err)
		}
		if missed += n - count; count > 0 {
			answers, ends = append(answers, last), append(ends, time.Since(began))
		}
	}
	if len(ends) > 0 {
		cl.c.putTimes(fmt.Sprintf("query, N=%d: from the command's start to the last answer", n), answers)
		cl.c.putTimes(fmt.Sprintf("query, N=%d: to the command's end", n), ends)
	}
	cl.c.put(fmt.Sprintf("query, N=%d: answers that did not come, of %d", n, 5*n), float64(missed))
}

// ---- what is measured on few agents ----

func benchSome(t *testing.T, c *contender, _ int) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	cl := newBenchCluster(t, c)
	script := &benchAgent{name: "handler"} // its lines, too, are sightings
	go func() {
		for lines := bufio.NewScanner(f); lines.Scan(); {
			cl.line(script, time.Now(), "[INFO] member-handled: "+lines.Text())
		}
	}()
	cl.startAll(benchFew, func(i int) []string {
		if i != 1 {
			return nil
		}
		return []string{`-event-handler=member-join=while read name rest; do echo "$name" >` + fifo + `; done`}
	})
	if benchWants("terminate") {
		cl.terminations()
	}
	if benchWants("handler") {
		cl.handlers()
	}
	if benchWants("stop") {
		cl.stops(envInt("BENCH_STOPS", 3))
	}
}

func (cl *benchCluster) terminations() {
	var took []time.Duration
	for i := 3; i < benchFew; i++ {
		failed := cl.watch(1, sighting{kind: "failed", name: cl.agents[i].name})
		handled := cl.watch(1, sighting{kind: "handled", name: cl.agents[i].name})
		at := cl.end(cl.agents[i], syscall.SIGTERM)
		first, _ := failed.must("a peer says that %s has failed", cl.agents[i].name)
		took = append(took, first.Sub(at))
		cl.restart(i, benchFew)
		if _, _, err := handled.wait(); err != nil && cl.c.i == 1 {
			fmt.Printf("peer: no handler runs for %s: %v\n", cl.agents[i].name, err) // it had not seen it go
		} else if err != nil {
			cl.t.Fatalf("did not happen: the handler runs for %s: %v", cl.agents[i].name, err)
		}
	}
	cl.c.putTimes(fmt.Sprintf("SIGTERM without leave, N=%d: a peer says failed", benchFew), took)
}

// handlers starts agents that join the first and waits for the second's
// handler.
func (cl *benchCluster) handlers() {
	var sinceStart, sinceLine []time.Duration
	for i := benchFew; i < benchFew+10; i++ {
		name := "n" + strconv.Itoa(i)
		logged := cl.watch(1, sighting{kind: "join", by: cl.agents[1].name, name: name})
		handled := cl.watch(1, sighting{kind: "handled", name: name})
		all := cl.watch(i, sighting{kind: "join", name: name})
		began := time.Now()
		cl.start(i, cl.address(i))
		at, _ := handled.must("the handler runs for %s", name)
		line, _ := logged.must("%s sees %s join", cl.agents[1].name, name)
		all.must("all see %s join", name)
		sinceStart, sinceLine = append(sinceStart, at.Sub(began)), append(sinceLine, at.Sub(line))
	}
	cl.c.putTimes("from starting an agent to a peer's handler running", sinceStart)
	cl.c.putTimes("from an event's log line to its script's first line", sinceLine)
}

// stops stops agents, one at a time, and lets them go on.
func (cl *benchCluster) stops(count int) {
	called := 0
	for k := range count {
		a := cl.agents[2+k%6]
		failed := cl.watch(1, sighting{kind: "failed", name: a.name})
		cl.end(a, syscall.SIGSTOP)
		time.Sleep(benchStop)
		stopped := slices.ContainsFunc(procStats(), func(p procStat) bool { return p.pgid == a.cmd.Process.Pid && p.state == 'T' })
		a.signal(syscall.SIGCONT)
		if !stopped {
			cl.t.Fatalf("did not happen: %s stops", a.name)
		}
		select {
		case <-failed.reached:
			called++
		case <-time.After(benchLate):
		}
	}
	cl.c.put(fmt.Sprintf("one of %d stopped for %v: called failed, times of %d", len(cl.agents), benchStop, count), float64(called))
}

// ---- a seed that comes last ----

func benchLateSeeds(t *testing.T, c *contender, n int) {
	if benchWants("late-rest") {
		t.Run("rest", func(t *testing.T) {
			cl := newBenchCluster(t, c)
			cl.startLate(benchFew, "-log-level=trace")
			time.Sleep(benchRest)
			cl.traffic(fmt.Sprintf("rest after late seeds, N=%d", benchFew), benchFew, benchSettle)
		})
	}
	if benchWants("late-seed") {
		n := min(3*n, 150)
		t.Run("seed", func(t *testing.T) {
			took := newBenchCluster(t, c).startLate(n)
			c.put(fmt.Sprintf("%d agents wait for their seed, which starts %v late: all in after, ms", n, benchSeedLate), inMs(took))
		})
	}
}

// startLate starts n agents, of which the last is the seed of all others and
// comes late. It returns how long after that all knew all.
func (cl *benchCluster) startLate(n int, options ...string) time.Duration {
	cl.t.Helper()
	cl.join = "-retry-join" // Serf's -join would not wait
	cl.seed = n - 1
	all := cl.watch(n*(n-1), sighting{kind: "join"})
	for i := range n - 1 {
		cl.start(i, cl.address(i), options...)
	}
	time.Sleep(benchSeedLate)
	began := time.Now()
	cl.start(n-1, cl.address(n-1), options...)
	_, last := all.must("all %d agents, whose seed comes late, see all others join", n)
	return last.Sub(began)
}

func percentile(ds []time.Duration, q float64) time.Duration {
	ds = slices.Sorted(slices.Values(ds))
	return ds[min(int(q*float64(len(ds))), len(ds)-1)]
}
