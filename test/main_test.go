// Package test tests the program from outside, as its users have it: processes,
// shells, networks, containers. It knows the command line, the output, the log
// and the ports, and nothing of the code.
package test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	defaultRPC = "127.0.0.1:7373"
	sameSignal = 200 * time.Millisecond // a signal that comes again so soon is the same Ctrl-C
	ms         = time.Millisecond
)

// program is what is tested. asker answers the tests' own questions: the same,
// but without the race detector, which would make each of them take long.
var program, asker string

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "example-web-server" {
		webServer(os.Args[2], os.Args[3])
		return
	}
	os.Exit(runTests(m))
}

// runTests runs the tests at the top of the source, where their paths begin.
func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "hamlet-")
	if err == nil {
		defer os.RemoveAll(dir)
		if err = os.Chdir(".."); err == nil {
			err = buildPrograms(dir)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// buildPrograms builds the program, unless HAMLET names one (and -count=1 tells
// go test that it may have changed).
func buildPrograms(dir string) error {
	program = filepath.Join(dir, "hamlet")
	asker = program
	if ready := os.Getenv("HAMLET"); ready != "" {
		ready, err := filepath.Abs(ready)
		return cmp.Or(err, os.Symlink(ready, program))
	}
	build := func(to, cgo string, flags ...string) error {
		cmd := exec.Command("go", slices.Concat([]string{"build", "-trimpath", "-buildvcs=false",
			"-ldflags", "-s -w", "-o", to}, flags, []string{"."})...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build: %w\n%s", err, out)
		}
		return nil
	}
	if !underRace() {
		return build(program, "0")
	}
	asker = filepath.Join(dir, "plain", "hamlet")
	return cmp.Or(build(program, "1", "-race"), build(asker, "0"))
}

// underRace reports whether the race detector is on: agents are then several
// times slower and larger.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// noteSources shows go test what the results depend on: it does not see what is
// read to build the program, and would take old results for good.
var noteSources = sync.OnceFunc(func() {
	os.Getenv("HAMLET")
	top, _ := os.Getwd()
	for _, pattern := range []string{"*.go", "go.mod", "Makefile", "*.md", "docs/*", "docs/*/*", "examples/*/*"} {
		files, _ := filepath.Glob(filepath.Join(top, pattern))
		for _, f := range files {
			os.Stat(f)
		}
	}
})

// ---- commands ----

// hamletCmd returns the program as a command, in an environment without
// settings for it.
func hamletCmd(args ...string) *exec.Cmd {
	noteSources()
	cmd := exec.Command(program, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "HAMLET_") || strings.HasPrefix(kv, "SERF_")
	})
	// A process under the race detector would sleep a second at its end.
	cmd.Env = append(cmd.Env, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// askCmd is a command by which a test itself asks an agent.
func askCmd(rpc, command string, args ...string) *exec.Cmd {
	cmd := hamletCmd(append([]string{command, "-rpc-addr", rpc}, args...)...)
	cmd.Path = asker
	return cmd
}

// place is where processes run: it calls start there.
type place func(start func())

func here(start func()) { start() }

// run runs a command to its end.
func (p place) run(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var err error
	p(func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func runCmd(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	return place(here).run(t, cmd)
}

// hamlet runs the command line to its end.
func hamlet(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runCmd(t, hamletCmd(args...))
}

// serfIn makes the program known as serf in a directory.
func serfIn(t *testing.T, dir string) (call func(args ...string) *exec.Cmd) {
	t.Helper()
	serf := filepath.Join(dir, "serf")
	if err := os.Symlink(program, serf); err != nil {
		t.Fatal(err)
	}
	return func(args ...string) *exec.Cmd {
		cmd := hamletCmd(args...)
		cmd.Path, cmd.Args[0] = serf, "serf"
		return cmd
	}
}

// helpOf returns what help says of a command; of all for "".
func helpOf(t *testing.T, command string) string {
	t.Helper()
	out, errs, code := hamlet(t, slices.DeleteFunc([]string{"help", command}, func(s string) bool { return s == "" })...)
	if code != 0 || errs != "" {
		t.Errorf("help %s: exit %d, stderr %q", command, code, errs)
	}
	return out
}

// commandNames are the commands that help lists.
func commandNames(t *testing.T) (names []string) {
	t.Helper()
	_, list, _ := strings.Cut(helpOf(t, ""), "\nCommands:\n")
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z-]+) `).FindAllStringSubmatch(list, -1) {
		names = append(names, m[1])
	}
	if !slices.Contains(names, "agent") || !slices.Contains(names, "members") {
		t.Fatalf("help lists %q", names)
	}
	return names
}

// ---- what a process writes ----

// output collects what a process writes, and when. It is safe for concurrent use.
type output struct {
	mu    sync.Mutex
	text  []byte
	lines []logLine
	whole int // how much of the text is in lines
}

type logLine struct {
	at   time.Time
	text string
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p...)
	for {
		line, _, ok := bytes.Cut(o.text[o.whole:], []byte("\n"))
		if !ok {
			return len(p), nil
		}
		o.lines = append(o.lines, logLine{time.Now(), string(line)})
		o.whole += len(line) + 1
	}
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}

// since returns the lines that came after mark.
func (o *output) since(mark time.Time) []logLine {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(o.lines), func(l logLine) bool { return !l.at.After(mark) })
}

// memberLine matches the log's line about an event of a member.
func memberLine(kind, name, ip string) *regexp.Regexp {
	return regexp.MustCompile(`(?m)\[(?:INFO|WARN)\] ` + kind + `: ` + regexp.QuoteMeta(name) + ` \[?` + regexp.QuoteMeta(ip) + `(\]?:\d+)?(?: \(.*\))?$`)
}

// eventLine matches the log's line about a user event.
func eventLine(name string) *regexp.Regexp {
	return regexp.MustCompile(`(?m)\[INFO\] user-event: ` + regexp.QuoteMeta(name) + `( .*)?$`)
}

// ---- agents ----

// agent is an agent in a process of its own.
type agent struct {
	t                *testing.T
	cmd              *exec.Cmd
	at               place
	host             int // in a world
	name             string
	bind, advertised string // IP:PORT, from the banner
	rpc              string // IP:PORT of its RPC
	stdout, stderr   *output
	exited           chan struct{}
}

// member is one as the members command shows it.
type member struct {
	Name, Addr, Status string
	Port               uint16
	Tags               map[string]string
}

// startAgent starts an agent with args and waits for its banner. Unless args
// say otherwise, it listens on free ports of 127.0.0.1.
func startAgent(t *testing.T, args ...string) *agent {
	t.Helper()
	return startAgentCmd(t, hamletCmd(agentArgs(args...)...))
}

// agentArgs puts the defaults of tests in front of args.
func agentArgs(args ...string) []string {
	return append([]string{"agent", "-bind", "127.0.0.1:0", "-rpc-addr", "127.0.0.1:0"}, args...)
}

// startAgentCmd is startAgent for a command that was prepared by the test.
func startAgentCmd(t *testing.T, cmd *exec.Cmd) *agent {
	t.Helper()
	a := launch(t, cmd, here)
	a.waitBanner()
	return a
}

// startKeyed starts an agent with keys from the environment; none is no key.
func startKeyed(t *testing.T, keys []string, args ...string) *agent {
	t.Helper()
	cmd := hamletCmd(agentArgs(args...)...)
	if len(keys) > 0 {
		cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+strings.Join(keys, ","))
	}
	return startAgentCmd(t, cmd)
}

// startCluster starts agents of these names and waits until all know all.
func startCluster(t *testing.T, names ...string) []*agent {
	t.Helper()
	return startKeyedCluster(t, nil, names...)
}

func startKeyedCluster(t *testing.T, keys []string, names ...string) (all []*agent) {
	t.Helper()
	for _, name := range names {
		args := []string{"-node", name}
		if len(all) > 0 {
			args = append(args, "-join", all[0].advertised)
		}
		all = append(all, startKeyed(t, keys, args...))
	}
	waitAlive(t, names, all...)
	return all
}

// waitAlive waits until all agents show all names as alive.
func waitAlive(t *testing.T, names []string, agents ...*agent) {
	t.Helper()
	for _, a := range agents {
		eventually(t, fmt.Sprintf("%s shows %v alive", a.name, names), func() bool {
			members := a.members()
			return !slices.ContainsFunc(names, func(name string) bool { return memberOf(members, name).Status != "alive" })
		})
	}
}

// launch starts the process and waits for nothing.
func launch(t *testing.T, cmd *exec.Cmd, at place) *agent {
	t.Helper()
	a := &agent{t: t, cmd: cmd, at: at, rpc: defaultRPC, stdout: &output{}, stderr: &output{}, exited: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = a.stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = a.stderr
	}
	cmd.WaitDelay = 5 * time.Second // handlers may hold the pipes
	var err error
	at(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(a.exited) }()
	t.Cleanup(a.end)
	return a
}

func (a *agent) end() {
	a.cmd.Process.Signal(syscall.SIGCONT)
	a.cmd.Process.Kill()
	<-a.exited
	for _, crash := range []string{"panic:", "fatal error:", "DATA RACE"} {
		if l := a.find(time.Time{}, crash); l != nil {
			a.t.Errorf("%s: %s", a.name, l.text)
		}
	}
	if a.t.Failed() {
		a.t.Logf("%s\n%s", strings.Join(a.cmd.Args[1:], " "), a.log(60))
	}
}

var bannerLines = regexp.MustCompile(`Node name: '(.*)'\n +Bind addr: '(.*)'\n +Advertise: '(.*)' \(.*\)\n +RPC addr: '(.*)'\n`)

func (a *agent) waitBanner() {
	a.t.Helper()
	var found []string
	eventually(a.t, "the banner of "+strings.Join(a.cmd.Args[1:], " "), func() bool {
		found = bannerLines.FindStringSubmatch(a.stdout.String())
		return found != nil || a.hasExited()
	})
	if found == nil {
		a.t.Fatalf("the agent ended at once: %s", a.stderr)
	}
	a.name, a.bind, a.advertised, a.rpc = found[1], found[2], found[3], found[4]
}

func (a *agent) hasExited() bool { return isClosed(a.exited) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (a *agent) signal(s syscall.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(s); err != nil {
		a.t.Errorf("%v to %s: %v", s, a.name, err)
	}
}

func (a *agent) kill() { a.t.Helper(); a.signal(syscall.SIGKILL); a.wait() }
func (a *agent) term() { a.t.Helper(); a.signal(syscall.SIGTERM) }
func (a *agent) int()  { a.t.Helper(); a.signal(syscall.SIGINT) }

// busy is how much longer things may take here than the tests ask for: other
// tests run at the same time. Simulations hold the protocol to its times.
const busy = 2

// exit waits until the process has ended and returns its exit status.
func (a *agent) exit(within time.Duration) int {
	a.t.Helper()
	select {
	case <-a.exited:
	case <-time.After(within * busy):
		a.t.Fatalf("%s still runs after %v", a.name, within)
	}
	return a.cmd.ProcessState.ExitCode()
}

func (a *agent) wait() int { a.t.Helper(); return a.exit(10 * time.Second) }

// find returns the first line since mark that holds text, or nil.
func (a *agent) find(mark time.Time, text string) *logLine {
	lines := a.since(mark)
	if i := slices.IndexFunc(lines, func(l logLine) bool { return strings.Contains(l.text, text) }); i >= 0 {
		return &lines[i]
	}
	return nil
}

// since returns the lines of the banner and the log that came after mark.
func (a *agent) since(mark time.Time) []logLine {
	return slices.Concat(a.stdout.since(mark), a.stderr.since(mark))
}

// log is the last n lines, with the arrival's milliseconds.
func (a *agent) log(n int) string {
	var b strings.Builder
	lines := a.since(time.Time{})
	for _, l := range lines[max(0, len(lines)-n):] {
		fmt.Fprintf(&b, "    %s %s\n", l.at.Format("05.000"), l.text)
	}
	return b.String()
}

// waitLog waits until the agent's log contains text.
func (a *agent) waitLog(text string) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%q in the log of %s", text, a.name), func() bool { return strings.Contains(a.stderr.String(), text) })
}

// waitLine waits until the agent's log has such a line.
func (a *agent) waitLine(line *regexp.Regexp) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%v in the log of %s", line, a.name), func() bool { return line.MatchString(a.stderr.String()) })
}

// count is how many lines of the agent's log hold text.
func (a *agent) count(text string) int { return strings.Count(a.stderr.String(), text) }

// members asks the agent for its members; nil if it does not answer.
func (a *agent) members() []member {
	var list struct{ Members []member }
	if out, _, code := a.at.run(a.t, askCmd(a.rpc, "members", "-format", "json")); code != 0 || json.Unmarshal([]byte(out), &list) != nil {
		return nil
	}
	return list.Members
}

// memberOf returns the member of that name; none has no name.
func memberOf(members []member, name string) member {
	if i := slices.IndexFunc(members, func(m member) bool { return m.Name == name }); i >= 0 {
		return members[i]
	}
	return member{}
}

func (a *agent) member(name string) member { return memberOf(a.members(), name) }

// status is what the agent says of a member; "" if it does not know it.
func (a *agent) status(name string) string { return a.member(name).Status }

// waitStatus waits until the agent says so of a member.
func (a *agent) waitStatus(name, status string) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%s says that %s is %s", a.name, name, status), func() bool { return a.status(name) == status })
}

// view is what the agent's members command shows, in short.
func (a *agent) view() string {
	var v []string
	members := a.members()
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.Name, b.Name) })
	for _, m := range members {
		v = append(v, m.Name+":"+m.Status)
	}
	return strings.Join(v, " ")
}

// run runs a command line that asks this agent.
func (a *agent) run(command string, args ...string) (stdout, stderr string, code int) {
	a.t.Helper()
	return a.at.run(a.t, hamletCmd(append([]string{command, "-rpc-addr", a.rpc}, args...)...))
}

// ---- helpers ----

// pause is between two looks; many a look is a process.
const pause = 15 * ms

// eventually waits for a condition, for 15 seconds at most.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !cond(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// takenPort listens on a free port of 127.0.0.1 until the test ends.
func takenPort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

// freePort returns an address that nobody listens on.
func freePort(t *testing.T) string { t.Helper(); return freeAddrs(t, "127.0.0.1", 1)[0] }

// freeAddrs returns addresses that nobody listens on. Away from 127.0.0.1 they
// are not taken as the source of a connection meanwhile, either.
func freeAddrs(t *testing.T, ip string, count int) (addrs []string) {
	t.Helper()
	for range count {
		ln, err := net.Listen("tcp", ip+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs
}

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

func readFile(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

type procStat struct {
	pid, ppid, pgid int
	state           byte
	comm            string
}

func procStats() []procStat {
	var ps []procStat
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		head, rest, ok := strings.Cut(readFile(f), ") ")
		pid, comm, _ := strings.Cut(head, " (")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 3 {
			continue
		}
		p := procStat{state: fields[0][0], comm: comm}
		p.pid, _ = strconv.Atoi(pid)
		p.ppid, _ = strconv.Atoi(fields[1])
		p.pgid, _ = strconv.Atoi(fields[2])
		ps = append(ps, p)
	}
	return ps
}

// groupAlive counts the processes of a group that are more than zombies.
func groupAlive(pgid int) (n int) {
	for _, p := range procStats() {
		if p.pgid == pgid && p.state != 'Z' {
			n++
		}
	}
	return n
}

func needProc(t *testing.T) {
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		t.Skip("SKIPPED: no /proc here to look for processes in")
	}
}

// pidIn reads a pid that a script wrote.
func pidIn(t *testing.T, path string) (pid int) {
	t.Helper()
	eventually(t, "a pid in "+filepath.Base(path), func() bool {
		s := readFile(path)
		pid, _ = strconv.Atoi(strings.TrimSpace(s))
		return strings.HasSuffix(s, "\n") && pid > 1
	})
	return pid
}

// eachShell runs f with the shells that scripts meet in the wild.
func eachShell(t *testing.T, f func(t *testing.T, shell string)) {
	for _, name := range []string{"sh", "dash", "bash", "busybox"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Logf("SKIPPED: no %s here", name)
			continue
		}
		if name == "busybox" { // is a shell when it is called sh
			link := filepath.Join(t.TempDir(), "sh")
			if err := os.Symlink(path, link); err != nil {
				t.Fatal(err)
			}
			path = link
		}
		t.Run(path, func(t *testing.T) { f(t, path) })
	}
}
