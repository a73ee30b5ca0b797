package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// TestMain lets the test binary be the command: tests start it as agents and
// as the command line, and a symlink to it can be called serf.
func TestMain(m *testing.M) {
	if os.Getenv("HAMLET_TEST_MAIN") == "1" {
		if name := os.Getenv("HAMLET_TEST_ARGV0"); name != "" {
			os.Args[0] = name
		}
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// --- helpers for tests with real processes

// hamletCmd returns this program as a command, in an environment without
// settings for hamlet. In tests elsewhere it may be wrapped ("ip netns exec").
func hamletCmd(args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "HAMLET_") || strings.HasPrefix(kv, "SERF_")
	})
	// A process under the race detector would sleep a second at its end.
	cmd.Env = append(cmd.Env, "HAMLET_TEST_MAIN=1", "HAMLET_TEST_ARGV0=hamlet", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// runCmd runs a command to its end.
func runCmd(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// hamlet runs the command line to its end.
func hamlet(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runCmd(t, hamletCmd(args...))
}

// processOutput collects what a process writes; safe for concurrent use.
type processOutput struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *processOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *processOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// testAgent is an agent in a process of its own.
type testAgent struct {
	t                *testing.T
	cmd              *exec.Cmd
	stdout, stderr   *processOutput
	name             string
	bind, advertised string // IP:PORT, from the banner
	rpc              string // IP:PORT of its RPC
	exited           chan struct{}
}

// startAgent starts an agent with args and waits for its banner. Unless args
// say otherwise, it listens on free ports of 127.0.0.1.
func startAgent(t *testing.T, args ...string) *testAgent {
	t.Helper()
	return startAgentCmd(t, hamletCmd(agentArgs(args...)...))
}

// agentArgs puts the defaults of tests in front of args.
func agentArgs(args ...string) []string {
	return append([]string{"agent", "-bind", "127.0.0.1:0", "-rpc-addr", "127.0.0.1:0"}, args...)
}

// startAgentCmd is startAgent for a command that was prepared by the test.
func startAgentCmd(t *testing.T, cmd *exec.Cmd) *testAgent {
	t.Helper()
	a := launchAgent(t, cmd)
	banner := regexp.MustCompile(`Node name: '(.*)'\n +Bind addr: '(.*)'\n +Advertise: '(.*)' \(.*\)\n +RPC addr: '(.*)'\n`)
	var found []string
	eventually(t, "the banner of "+strings.Join(cmd.Args[1:], " "), func() bool {
		found = banner.FindStringSubmatch(a.stdout.String())
		return found != nil || a.hasExited()
	})
	if found == nil {
		t.Fatalf("the agent ended at once: %s", a.stderr)
	}
	a.name, a.bind, a.advertised, a.rpc = found[1], found[2], found[3], found[4]
	return a
}

// launchAgent starts the process and waits for nothing.
func launchAgent(t *testing.T, cmd *exec.Cmd) *testAgent {
	t.Helper()
	a := &testAgent{t: t, cmd: cmd, stdout: &processOutput{}, stderr: &processOutput{}, exited: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = a.stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = a.stderr
	}
	cmd.WaitDelay = 5 * time.Second // handlers may hold the pipes
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(a.exited) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Kill()
		<-a.exited
		if t.Failed() {
			t.Logf("%s\n%s%s", strings.Join(cmd.Args[1:], " "), a.stdout, a.stderr)
		}
	})
	return a
}

func (a *testAgent) hasExited() bool {
	select {
	case <-a.exited:
		return true
	default:
		return false
	}
}

func (a *testAgent) signal(s syscall.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(s); err != nil {
		a.t.Errorf("%v to %s: %v", s, a.name, err)
	}
}

func (a *testAgent) kill() { a.t.Helper(); a.signal(syscall.SIGKILL); a.wait() }
func (a *testAgent) term() { a.t.Helper(); a.signal(syscall.SIGTERM) }
func (a *testAgent) int()  { a.t.Helper(); a.signal(syscall.SIGINT) }

// wait waits until the process has ended and returns its exit status.
func (a *testAgent) wait() int {
	a.t.Helper()
	select {
	case <-a.exited:
	case <-time.After(20 * time.Second):
		a.t.Fatalf("%s did not end", a.name)
	}
	return a.cmd.ProcessState.ExitCode()
}

// waitLog waits until the agent's log contains text.
func (a *testAgent) waitLog(text string) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%q in the log of %s", text, a.name), func() bool { return strings.Contains(a.stderr.String(), text) })
}

// members asks the agent for its members; nil if it does not answer.
func (a *testAgent) members() []Member {
	ans, err := callRPC(a.rpc, "", request{Op: "members"}, rpcTimeout)
	if err != nil {
		return nil
	}
	return ans.Members
}

// status is what the agent says of a member; "" if it does not know it.
func (a *testAgent) status(name string) string {
	for _, m := range a.members() {
		if m.Name == name {
			return m.Status.String()
		}
	}
	return ""
}

// waitStatus waits until the agent says so of a member.
func (a *testAgent) waitStatus(name, status string) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%s says that %s is %s", a.name, name, status), func() bool { return a.status(name) == status })
}

// runCmd runs a command line that asks this agent.
func (a *testAgent) run(command string, args ...string) (stdout, stderr string, code int) {
	a.t.Helper()
	return hamlet(a.t, append([]string{command, "-rpc-addr", a.rpc}, args...)...)
}

// startCluster starts agents of these names and waits until all know all.
func startCluster(t *testing.T, names ...string) []*testAgent {
	t.Helper()
	var all []*testAgent
	for _, name := range names {
		args := []string{"-node", name}
		if len(all) > 0 {
			args = append(args, "-join", all[0].advertised)
		}
		all = append(all, startAgent(t, args...))
	}
	for _, a := range all {
		for _, name := range names {
			a.waitStatus(name, "alive")
		}
	}
	return all
}

// eventually waits for a condition, for 15 seconds at most.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// takenPort listens on a free port of 127.0.0.1 until the test ends.
func takenPort(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

// freePort returns an address that nobody listens on.
func freePort(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// --- what the user types

func TestHelpBeginsWithCommandsAndFits80Columns(t *testing.T) {
	texts := map[string]string{"": ""}
	for _, newCommand := range commands {
		texts[newCommand().name] = ""
	}
	for name := range texts {
		args := []string{"help", name}
		if name == "" {
			args = args[:1]
		}
		out, errs, code := hamlet(t, args...)
		if code != 0 || errs != "" || !strings.HasPrefix(out, "  hamlet ") {
			t.Errorf("help %s: exit %d, stderr %q, stdout:\n%s", name, code, errs, out)
		}
		for line := range strings.Lines(out) {
			if len(line) > 81 || strings.TrimRight(line, " \n") != strings.TrimSuffix(line, "\n") {
				t.Errorf("help %s: bad line %q", name, line)
			}
		}
		texts[name] = out
	}
	for _, newCommand := range commands {
		c := newCommand()
		if !strings.Contains(texts[""], "\n  "+c.name+" ") {
			t.Errorf("help does not list %s", c.name)
		}
		for _, o := range c.options {
			if o.name != "" && strings.Count(texts[c.name], "\n  -"+o.name) != 1 {
				t.Errorf("help %s does not explain -%s once", c.name, o.name)
			}
		}
		for _, flag := range []string{"-h", "-help", "--help"} {
			if out, _, code := hamlet(t, c.name, flag); code != 0 || out != texts[c.name] {
				t.Errorf("%s %s: exit %d, not the text of help %s", c.name, flag, code, c.name)
			}
		}
	}
}

func TestDefaultsInTheHelpAreTrue(t *testing.T) {
	for _, newCommand := range commands {
		for _, o := range newCommand().options {
			_, doc, ok := strings.Cut(o.text, "(default: ")
			doc, _, _ = strings.Cut(doc, ")")
			if !ok || strings.Contains(doc, " ") || doc == "never" {
				continue
			}
			want := ""
			switch v := o.value.(type) {
			case *string:
				want = *v
			case *bool:
				want = fmt.Sprint(*v)
			case *time.Duration:
				d, err := time.ParseDuration(doc)
				if err != nil || d != *v {
					t.Errorf("-%s: the help says %s, it is %v", o.name, doc, *v)
				}
				continue
			}
			if doc != want {
				t.Errorf("-%s: the help says %q, it is %q", o.name, doc, want)
			}
		}
	}
}

func TestKeygenMakesKeysThatAgentsTake(t *testing.T) {
	one, _, _ := hamlet(t, "keygen")
	two, _, _ := hamlet(t, "keygen")
	if one == two {
		t.Error("the same key twice")
	}
	if _, err := parseKeys([]string{strings.TrimSuffix(one, "\n"), two}); err != nil {
		t.Error(err)
	}
}

func TestVersionIsPrinted(t *testing.T) {
	for _, arg := range []string{"version", "-version", "--version", "-v"} {
		if out, errs, code := hamlet(t, arg); code != 0 || errs != "" || !strings.HasPrefix(out, "hamlet "+version) {
			t.Errorf("%s: %q %q %d", arg, out, errs, code)
		}
	}
}

func TestTheNameItWasCalledByIsInUsageAndErrors(t *testing.T) {
	serf := filepath.Join(t.TempDir(), "serf")
	self, _ := os.Executable()
	if err := os.Symlink(self, serf); err != nil {
		t.Fatal(err)
	}
	call := func(args ...string) *exec.Cmd {
		cmd := hamletCmd(args...)
		cmd.Path, cmd.Args[0] = serf, "serf"
		cmd.Env = append(cmd.Env, "HAMLET_TEST_ARGV0=")
		return cmd
	}
	if out, _, _ := runCmd(t, call("help", "members")); !strings.HasPrefix(out, "  serf members") || strings.Contains(out, "hamlet") {
		t.Errorf("help members of serf:\n%s", out)
	}
	if _, errs, _ := runCmd(t, call("members", "-rpc-addr", freePort(t))); !strings.HasPrefix(errs, "serf: error: ") || !strings.Contains(errs, "'serf agent'") {
		t.Errorf("error of serf: %s", errs)
	}
}

func TestErrorsNameTheValueAndGiveAHint(t *testing.T) {
	taken, free := takenPort(t), freePort(t)
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{'k'}, keySize))
	long := strings.Repeat("x", 600)
	agent := func(args ...string) []string { return agentArgs(append([]string{"-node", "a"}, args...)...) }
	tests := []struct {
		args []string
		code int
		want []string // in stderr
	}{
		{nil, 2, []string{`no command given`, "hint: 'hamlet help'"}},
		{[]string{"dance"}, 2, []string{`no command "dance"`, "hint: 'hamlet help'"}},
		{[]string{"help", "dance"}, 2, []string{`no command "dance"`}},
		{[]string{"members", "-colour"}, 2, []string{"not defined: -colour", "hint: 'hamlet help members'"}},
		{[]string{"agent", "-node"}, 2, []string{"needs an argument: -node"}},
		{agent("extra"), 2, []string{`unexpected argument "extra"`, "hint: 'hamlet help agent'"}},
		{agent("-log-level", "loud"), 2, []string{`"loud"`, "trace, debug, info, warn, err"}},
		{agent("-retry-max", "-1"), 2, []string{`"-1"`, "-retry-max"}},
		{agent("-handler-timeout", "10"), 2, []string{`"10"`, "-handler-timeout", "20s"}},
		{agent("-reap-after", "0s"), 2, []string{`"0s"`, "-reap-after"}},
		{agent("-leave-on-terminate=maybe"), 2, []string{`"maybe"`, "true or false"}},
		{agent("-bind", "nowhere"), 2, []string{`"nowhere"`, "hint: -bind takes IP:PORT"}},
		{agent("-bind", "10.0.0.1:99999"), 2, []string{`"10.0.0.1:99999"`}},
		{agent("-bind", "1.2.3"), 2, []string{`"1.2.3"`}},
		{agent("-bind", taken), 1, []string{"cannot listen on " + taken, "address already in use", "hint:", "-bind"}},
		{agent("-bind", "198.51.100.7:7946"), 1, []string{"198.51.100.7:7946", "hint:", "no such address"}},
		{agent("-rpc-addr", taken), 1, []string{"cannot listen on " + taken + " for the RPC", "hint: is an agent running", "-rpc-addr"}},
		{agent("-rpc-addr", "a:b:c"), 2, []string{`"a:b:c"`, "hint: -rpc-addr takes HOST:PORT"}},
		{agent("-advertise", "0.0.0.0"), 2, []string{"0.0.0.0", "-advertise"}},
		{agent("-advertise", "a b"), 2, []string{`"a b"`, "-advertise"}},
		{agent("-iface", "nope0"), 2, []string{`"nope0"`, "-iface"}},
		{agent("-iface", "lo", "-advertise", "10.0.0.1"), 2, []string{"lo", "10.0.0.1", "one of them"}},
		{agent("-join", "a b"), 2, []string{`-join: "a b"`, "hint:"}},
		{agent("-join", "host:port"), 2, []string{`"host:port"`, "hint:"}},
		{agent("-join", "10.0.0.1:0"), 2, []string{`"10.0.0.1:0"`, "hint:"}},
		{agent("-join", ""), 2, []string{`""`, "hint:"}},
		{agent("-node", "two words"), 2, []string{`"two words"`, "hint:", "-node"}},
		{agent("-node", strings.Repeat("n", 129)), 2, []string{"129 bytes", "128"}},
		{agent("-tag", "role"), 2, []string{`"role"`, "hint: for example: -tag role=web"}},
		{agent("-tag", "=x"), 2, []string{`"=x"`}},
		{agent("-tag", "a="+long), 2, []string{"602 bytes", "512"}},
		{agent("-role", "db", "-tag", "role=web"), 2, []string{`"db"`, `"web"`}},
		{agent("-event-handler", "member-jion=x"), 2, []string{"member-jion", "hint:"}},
		{agent("-encrypt", "c2hvcnQ="), 2, []string{"key 1 of 1 has 5 bytes", "32", "hamlet keygen"}},
		{agent("-encrypt", key, "-encrypt", "%%%"), 2, []string{"key 2 of 2 is not base64", "hamlet keygen"}},
		{[]string{"members", "-rpc-addr", free}, 1, []string{free, "connection refused", "hint: is the agent running?", "'hamlet agent'", "-rpc-addr"}},
		{[]string{"members", "-rpc-addr", "no where"}, 2, []string{`"no where"`}},
		{[]string{"members", "-name", "("}, 2, []string{`"("`, "-name", "regular expression"}},
		{[]string{"members", "-status", "["}, 2, []string{`"["`, "-status"}},
		{[]string{"members", "-tag", "role=*"}, 2, []string{`"*"`, "-tag"}},
		{[]string{"members", "-tag", "role"}, 2, []string{`"role"`, "KEY=RE"}},
		{[]string{"members", "-format", "xml"}, 2, []string{`"xml"`, "text or json"}},
		{[]string{"members", "-wait", "three"}, 2, []string{`"three"`, "-wait"}},
		{[]string{"members", "-timeout", "1s"}, 2, []string{"-wait"}},
		{[]string{"members", "web"}, 2, []string{`"web"`}},
		{[]string{"join"}, 2, []string{"ADDR", "missing"}},
		{[]string{"join", "not an address"}, 2, []string{`"not an address"`}},
		{[]string{"join", "-rpc-addr", free, "127.0.0.1"}, 1, []string{free}},
		{[]string{"force-leave"}, 2, []string{"NAME"}},
		{[]string{"force-leave", "a", "-prune"}, 2, []string{`"-prune"`}},
		{[]string{"event"}, 2, []string{"NAME"}},
		{[]string{"event", "e", strings.Repeat("p", 1024)}, 1, []string{"1 and 1024", "at most 1024"}},
		{[]string{"keygen", "now"}, 2, []string{`"now"`}},
	}
	for _, tt := range tests {
		name := strings.Join(tt.args, " ")
		out, errs, code := hamlet(t, tt.args...)
		if code != tt.code || out != "" || !strings.HasPrefix(errs, "hamlet: error: ") {
			t.Errorf("%.80s: exit %d, stdout %q, stderr %q; want exit %d", name, code, out, errs, tt.code)
		}
		for _, w := range tt.want {
			if !strings.Contains(errs, w) {
				t.Errorf("%.80s: no %q in %q", name, w, errs)
			}
		}
		if strings.Contains(errs, "goroutine") || strings.Count(errs, "\n") > 2 {
			t.Errorf("%.80s: too much: %s", name, errs)
		}
	}
}

func TestAKeyIsNeverShown(t *testing.T) {
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{'k'}, keySize))
	short := key[4:]
	for _, args := range [][]string{
		agentArgs("-encrypt", short), agentArgs("-encrypt", key, key, "x"), agentArgs("-encrypt", key, "-bind", "x"), {"agent", "-h", "-encrypt", key},
	} {
		if out, errs, _ := hamlet(t, args...); strings.Contains(out+errs, short[:20]) {
			t.Errorf("%v shows the key: %s%s", args, out, errs)
		}
	}
	for _, v := range []string{short, key + ",bad"} {
		cmd := hamletCmd(agentArgs()...)
		cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+v)
		if out, errs, code := runCmd(t, cmd); code != 2 || strings.Contains(out+errs, short[:20]) {
			t.Errorf("exit %d, or the key is shown: %s%s", code, out, errs)
		}
	}
	cmd := hamletCmd(agentArgs("-log-level", "trace", "-event-handler", "env; tr '\\0' ' ' < /proc/$PPID/cmdline; echo; echo done")...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+key)
	a := startAgentCmd(t, cmd)
	a.waitLog("\ndone\n")
	a.int()
	a.wait()
	if s := a.stdout.String() + a.stderr.String(); strings.Contains(s, short[:20]) || strings.Contains(s, "HAMLET_ENCRYPT") {
		t.Error("the key reached the log, the command line or the handler's environment")
	}
}

// --- addresses

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1":            "10.0.0.1 7946",
		"10.0.0.1:80":         "10.0.0.1 80",
		"::1":                 "::1 7946",
		"[::1]":               "::1 7946",
		"[::1]:80":            "::1 80",
		"[fe80::1%eth0]:80":   "fe80::1%eth0 80",
		"web1":                "web1 7946",
		"web_1.example.com:1": "web_1.example.com 1",
		":80":                 " 80",
		"a:b":                 "", "a:1:2": "", "a:70000": "", "a b": "", "a:": "", "http://x": "", "[x": "", "-x": "", "a\x1b": "",
	} {
		host, port, err := hostPort(in, defaultPort)
		if got := host + " " + port; err == nil && got != want || err != nil && want != "" {
			t.Errorf("hostPort(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestAdvertisedAddress(t *testing.T) {
	any4, any6 := netip.MustParseAddrPort("0.0.0.0:7946"), netip.MustParseAddrPort("[::]:7946")
	bound := netip.MustParseAddrPort("127.0.0.9:7000")
	if got, why := chooseAdvertise(bound, []string{"10.0.0.1"}); got != bound || why != "the bound address" {
		t.Errorf("bound to %s: advertised %s (%s)", bound, got, why)
	}
	for _, bind := range []netip.AddrPort{any4, any6} {
		for _, seeds := range [][]string{nil, {"127.0.0.1"}, {"[::1]:7946", "no.such.host.invalid"}, {"198.51.100.9:1234"}} {
			got, why := chooseAdvertise(bind, seeds)
			ip := got.Addr()
			alone := why == "no other address was found"
			if !ip.IsValid() || ip.IsUnspecified() || ip.IsLoopback() != alone || ip.IsMulticast() || got.Port() != 7946 || why == "" {
				t.Errorf("bind %s, seeds %v: advertised %s (%s)", bind, seeds, got, why)
			}
			if bind == any4 && !ip.Is4() {
				t.Errorf("bind %s: advertised %s, which does not arrive there", bind, got)
			}
		}
	}
	for _, bad := range []string{"0.0.0.0", "127.0.0.1", "::", "::1", "fe80::1", "224.0.0.1", "169.254.1.1", "2001:db8::1%eth0"} {
		if usable(netip.MustParseAddr(bad), netip.IPv6Unspecified()) {
			t.Errorf("%s counts as usable", bad)
		}
	}
	for _, good := range []string{"8.8.8.8", "10.0.0.1", "100.64.0.1", "192.168.1.1", "2001:db8::1", "fd00::1"} {
		if !usable(netip.MustParseAddr(good), netip.IPv6Unspecified()) {
			t.Errorf("%s does not count as usable", good)
		}
	}
}

func TestAdvertiseOptionDecides(t *testing.T) {
	for _, tt := range []struct{ bind, advertise, want string }{
		{"0.0.0.0:7000", "10.1.2.3", "10.1.2.3:7000"},
		{"0.0.0.0:7000", "10.1.2.3:80", "10.1.2.3:80"},
		{"0.0.0.0:7000", "localhost", "127.0.0.1:7000"},
		{"[::]:7000", "2001:db8::5", "[2001:db8::5]:7000"},
		{"[::]:7000", "[2001:db8::5]:80", "[2001:db8::5]:80"},
		{"[::]:7000", "10.1.2.3", "10.1.2.3:7000"},
		{"0.0.0.0:7000", "2001:db8::5", ""},
		{"0.0.0.0:7000", "::", ""},
		{"0.0.0.0:7000", "no.such.host.invalid", ""},
	} {
		a := agentOptions{advertise: tt.advertise, gossip: GossipConfig{Bind: netip.MustParseAddrPort(tt.bind)}}
		got, _, err := a.advertised()
		if err == nil && got.String() != tt.want || err != nil && tt.want != "" {
			t.Errorf("-bind %s -advertise %s: %s, %v; want %s", tt.bind, tt.advertise, got, err, tt.want)
		}
	}
}

// --- output

var exampleMembers = []Member{
	{Name: "c1fbbfe7c9ea", Addr: netip.MustParseAddrPort("172.17.0.20:7946"), Status: StatusAlive},
	{Name: "precise64", Addr: netip.MustParseAddrPort("10.0.2.15:7946"), Status: StatusAlive, Tags: "role=lb"},
}

func TestMembersTextIsAligned(t *testing.T) {
	want := "c1fbbfe7c9ea    172.17.0.20:7946    alive\n" +
		"precise64       10.0.2.15:7946      alive     role=lb\n"
	if got := membersText(exampleMembers); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
	ms := append(slices.Clone(exampleMembers), Member{Name: "ノード", Addr: netip.MustParseAddrPort("[2001:db8::7]:7946"), Status: StatusLeaving, Tags: "a=1\x00b=x y"})
	want = "c1fbbfe7c9ea    172.17.0.20:7946      alive\n" +
		"precise64       10.0.2.15:7946        alive      role=lb\n" +
		"ノード             [2001:db8::7]:7946    leaving    a=1,b=x y\n"
	if got := membersText(ms); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
}

func TestMembersJSONIsSerfs(t *testing.T) {
	want := `{
  "members": [
    {
      "name": "c1fbbfe7c9ea",
      "addr": "172.17.0.20:7946",
      "port": 7946,
      "tags": {},
      "status": "alive"
    },
    {
      "name": "precise64",
      "addr": "10.0.2.15:7946",
      "port": 7946,
      "tags": {
        "role": "lb"
      },
      "status": "alive"
    }
  ]
}
`
	if got := membersJSON(exampleMembers); got != want {
		t.Error(cmp.Diff(want, got))
	}
	if got := membersJSON(nil); got != "{\n  \"members\": []\n}\n" {
		t.Errorf("no members: %q", got)
	}
}

func TestEscapeSequencesFromPeersDoNotReachTheTerminal(t *testing.T) {
	nasty := "\x1b[2J\u009b31m\x7f\"\\\u202e\r\n\tü日\U0001f600\U000e0001"
	ms := []Member{{Name: nasty, Addr: exampleMembers[0].Addr, Status: StatusAlive, Tags: Tags("k" + nasty + "=v" + nasty)}}
	graphic := func(s string) bool {
		return strings.IndexFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) && r != '\n' }) < 0
	}
	text, js := membersText(ms), membersJSON(ms)
	if !graphic(text) || strings.Count(text, "\n") != 1 {
		t.Errorf("text: %q", text)
	}
	if !graphic(js) {
		t.Errorf("json: %q", js)
	}
	var back struct {
		Members []struct {
			Name string
			Tags map[string]string
		}
	}
	if err := json.Unmarshal([]byte(js), &back); err != nil || back.Members[0].Name != nasty || back.Members[0].Tags["k"+nasty] != "v"+nasty {
		t.Errorf("json does not say the same: %v %q", err, back)
	}
	if got := printable("a\tb\n\x1bc\xff'\"\\", "\n\t"); got != "a\tb\n\\x1bc\\xff'\"\\" {
		t.Errorf("printable: %q", got)
	}
}

func TestListsFromTheEnvironment(t *testing.T) {
	for in, want := range map[string][]string{
		"a":                            {"a"},
		" a , b ,, c,":                 {"a", "b", "c"},
		"member-join,member-leave=x,y": {"member-join,member-leave=x", "y"},
		"user:deploy,user=x":           {"user:deploy,user=x"},
		"user:deploy=x,y=z":            {"user:deploy=x", "y=z"},
		"member-join":                  {"member-join"},
		"awk -F, 1\n":                  {"awk -F, 1"},
		"a=1,2\nb=3":                   {"a=1,2", "b=3"},
		",":                            nil,
	} {
		if got := splitList(in); !slices.Equal(got, want) {
			t.Errorf("splitList(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLogIsFilteredByLevelAndEscaped(t *testing.T) {
	w := newLogWriter(slices.Index(logLevels, "info"))
	l := log.New(w, "", log.LstdFlags)
	for _, level := range logLevels {
		l.Printf("[%s] x\x1b[2Jy\n\tz", strings.ToUpper(level))
	}
	l.Print("no level [DEBUG]")
	var got []string
	for len(w.lines) > 0 {
		got = append(got, (<-w.lines)[len("2013/12/08 07:56:48 "):])
	}
	want := []string{"[INFO] x\\x1b[2Jy\n\tz\n", "[WARN] x\\x1b[2Jy\n\tz\n", "[ERR] x\\x1b[2Jy\n\tz\n", "no level [DEBUG]\n"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for range cap(w.lines) + 7 {
		l.Print("[INFO] nobody reads this") // must not block
	}
	if n := w.lost.Load(); n != 7 {
		t.Errorf("%d lines counted as lost, want 7", n)
	}
}

// --- agents in real processes

func TestBannerTellsNameAndAddresses(t *testing.T) {
	a := startAgent(t, "-node", "precise64", "-bind", "0.0.0.0:0", "-advertise", "127.0.0.1")
	_, port, _ := net.SplitHostPort(a.bind)
	want := fmt.Sprintf(`==> Starting hamlet agent...
==> Starting hamlet agent RPC...
==> hamlet agent running!
    Node name: 'precise64'
    Bind addr: '0.0.0.0:%s'
    Advertise: '127.0.0.1:%s' (set with -advertise)
     RPC addr: '%s'
`, port, port, a.rpc)
	if got := a.stdout.String(); got != want {
		t.Error(cmp.Diff(want, got))
	}
	a.waitLog("[INFO] member-join: precise64 127.0.0.1\n")
	if line := a.stderr.String(); !regexp.MustCompile(`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[INFO\] `).MatchString(line) {
		t.Errorf("log: %q", line)
	}
}

func TestSecondAgentOnOnePortIsToldSo(t *testing.T) {
	a := startAgent(t)
	for option, addr := range map[string]string{"-rpc-addr": a.rpc, "-bind": a.bind} {
		_, errs, code := hamlet(t, agentArgs(option, addr)...)
		if code != 1 || !strings.Contains(errs, addr) || !strings.Contains(errs, "in use") || !strings.Contains(errs, "hint: is an agent running there already? choose another address with "+option) {
			t.Errorf("%s %s: exit %d, %s", option, addr, code, errs)
		}
	}
}

func TestAPortOfAnotherKindIsNotTakenForAnAgent(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	_, errs, code := hamlet(t, "members", "-rpc-addr", a.advertised)
	if code != 1 || !strings.Contains(errs, a.advertised) || !strings.Contains(errs, "hint: ") {
		t.Errorf("members at the gossip port: exit %d, %s", code, errs)
	}
}

func TestMembersFiltersAndFormats(t *testing.T) {
	t.Parallel()
	web1 := startAgent(t, "-node", "web1", "-role", "web", "-tag", "zone=a")
	web2 := startAgent(t, "-node", "web2", "-role", "web", "-tag", "zone=ab", "-join", web1.advertised)
	db := startAgent(t, "-node", "db", "-tag", "role=db", "-join", web1.advertised)
	names := func(args ...string) string {
		out, errs, code := web1.run("members", args...)
		if code != 0 || errs != "" {
			t.Errorf("members %v: exit %d, %s", args, code, errs)
		}
		var found []string
		for line := range strings.Lines(out) {
			found = append(found, strings.Fields(line)[0])
		}
		return strings.Join(found, " ")
	}
	names("-wait", "3", "-timeout", "15s")
	out, _, _ := web1.run("members")
	want := fmt.Sprintf("%-4s    %-15s    alive     role=db\n%-4s    %-15s    alive     role=web,zone=a\n%-4s    %-15s    alive     role=web,zone=ab\n",
		"db", db.advertised, "web1", web1.advertised, "web2", web2.advertised)
	if out != want {
		t.Error(cmp.Diff(want, out))
	}
	db.kill()
	web1.waitStatus("db", "failed")
	for args, want := range map[string]string{
		"":                               "db web1 web2",
		"-status alive":                  "web1 web2",
		"-status failed|left":            "db",
		"-status ali":                    "",
		"-name web.":                     "web1 web2",
		"-name we":                       "",
		"-tag role=web":                  "web1 web2",
		"-tag role=web -tag zone=a":      "web1",
		"-tag zone=.*":                   "web1 web2",
		"-tag none=.*":                   "",
		"-name .*1|db -status alive":     "web1",
		"--name=db":                      "db",
		"-name db|web1 -tag role=[bd]+":  "db",
		"-wait 2 -name web1 -timeout 1s": "",
	} {
		if strings.Contains(args, "-wait") {
			if _, errs, code := web1.run("members", strings.Fields(args)...); code != 1 || !strings.Contains(errs, "1 of 2 members alive after 1s") {
				t.Errorf("members %s: exit %d, %s", args, code, errs)
			}
		} else if got := names(strings.Fields(args)...); got != want {
			t.Errorf("members %s: %q, want %q", args, got, want)
		}
	}
	var js struct {
		Members []struct {
			Name, Addr, Status string
			Port               uint16
			Tags               map[string]string
		}
	}
	out, _, _ = web1.run("members", "-format", "json", "-name", "web2")
	if err := json.Unmarshal([]byte(out), &js); err != nil || len(js.Members) != 1 {
		t.Fatalf("json: %v\n%s", err, out)
	}
	if m := js.Members[0]; m.Name != "web2" || m.Addr != web2.advertised || m.Status != "alive" || !strings.HasSuffix(m.Addr, fmt.Sprint(":", m.Port)) || m.Tags["zone"] != "ab" {
		t.Errorf("json: %s", out)
	}
}

func TestWaitAlsoWaitsForTheAgentItself(t *testing.T) {
	t.Parallel()
	rpc := freePort(t)
	if _, errs, code := hamlet(t, "members", "-rpc-addr", rpc, "-wait", "1", "-timeout", "300ms"); code != 1 || !strings.Contains(errs, "no agent answers at "+rpc) {
		t.Errorf("nobody there: exit %d, %s", code, errs)
	}
	waiting := launchAgent(t, hamletCmd("members", "-rpc-addr", rpc, "-wait", "2", "-timeout", "20s"))
	a := startAgent(t, "-node", "a", "-rpc-addr", rpc)
	startAgent(t, "-node", "b", "-join", a.advertised)
	if code := waiting.wait(); code != 0 || strings.Count(waiting.stdout.String(), "alive\n") != 2 {
		t.Errorf("exit %d, %s%s", code, waiting.stdout, waiting.stderr)
	}
}

func TestAStoppedAgentIsGivenUpAfterFiveSeconds(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	a.signal(syscall.SIGSTOP)
	start := time.Now()
	_, errs, code := a.run("members")
	if took := time.Since(start); took < 4*time.Second || took > 9*time.Second {
		t.Errorf("gave up after %v", took)
	}
	if code != 1 || !strings.Contains(errs, a.rpc+" did not answer within 5s") || !strings.Contains(errs, "hint:") {
		t.Errorf("exit %d, %s", code, errs)
	}
}

func TestOptionsComeFromTheEnvironmentAndFlagsWin(t *testing.T) {
	t.Parallel()
	seed := startAgent(t, "-node", "seed")
	cmd := hamletCmd("agent", "-tag", "flag=wins")
	cmd.Env = append(cmd.Env, "HAMLET_NODE=envy", "HAMLET_BIND=127.0.0.1:0", "HAMLET_RPC_ADDR=127.0.0.1:0", "HAMLET_RPC_AUTH=sesame",
		"HAMLET_JOIN=127.0.0.1:1,"+seed.advertised, "HAMLET_TAG=env=loses", "HAMLET_ROLE=web", "HAMLET_LOG_LEVEL=debug", "HAMLET_RETRY_MAX=",
		"HAMLET_EVENT_HANDLER=member-join,member-failed=echo handler:$SERF_EVENT,user=echo user-handler", "HAMLET_LEAVE_ON_TERMINATE=true")
	a := startAgentCmd(t, cmd)
	if a.name != "envy" {
		t.Errorf("node name %s", a.name)
	}
	seed.waitStatus("envy", "alive")
	for _, m := range seed.members() {
		if m.Name == "envy" && m.Tags != "flag=wins\x00role=web" {
			t.Errorf("tags %q", m.Tags)
		}
	}
	a.waitLog("handler:member-join")

	ask := func(env ...string) (string, string, int) {
		cmd := hamletCmd("members", "-name", "envy")
		cmd.Env = append(cmd.Env, env...)
		return runCmd(t, cmd)
	}
	if _, errs, code := ask("SERF_RPC_ADDR=" + a.rpc); code != 1 || !strings.Contains(errs, "wants a token") || !strings.Contains(errs, "SERF_RPC_AUTH") {
		t.Errorf("without a token: exit %d, %s", code, errs)
	}
	if _, errs, code := ask("SERF_RPC_ADDR="+a.rpc, "SERF_RPC_AUTH=melon"); code != 1 || !strings.Contains(errs, "another token") || strings.Contains(errs, "melon") {
		t.Errorf("with a wrong token: exit %d, %s", code, errs)
	}
	for _, prefix := range []string{"SERF_", "HAMLET_"} { // a container's settings serve both
		if out, errs, code := ask(prefix+"RPC_ADDR="+a.rpc, prefix+"RPC_AUTH=sesame"); code != 0 || !strings.HasPrefix(out, "envy ") {
			t.Errorf("with %sRPC_AUTH: exit %d, %s", prefix, code, errs)
		}
	}
	a.term()
	if code := a.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
	seed.waitStatus("envy", "left")
}

func TestBadValueInTheEnvironmentNamesTheVariable(t *testing.T) {
	cmd := hamletCmd(agentArgs()...)
	cmd.Env = append(cmd.Env, "HAMLET_HANDLER_TIMEOUT=soon")
	if _, errs, code := runCmd(t, cmd); code != 2 || !strings.Contains(errs, `"soon" for HAMLET_HANDLER_TIMEOUT`) {
		t.Errorf("exit %d, %s", code, errs)
	}
}

// startStubborn starts an agent whose handler runs for longer than it is given
// when the agent ends, and waits until it runs.
func startStubborn(t *testing.T, args ...string) *testAgent {
	t.Helper()
	up := filepath.Join(t.TempDir(), "up")
	a := startAgent(t, append(args, "-event-handler", "trap '' TERM; : > "+up+"; sleep 6")...)
	eventually(t, "the handler runs", func() bool { _, err := os.Stat(up); return err == nil })
	return a
}

func TestSignals(t *testing.T) {
	t.Run("interrupt leaves", func(t *testing.T) {
		t.Parallel()
		as := startCluster(t, "a", "b")
		as[1].int()
		if code := as[1].wait(); code != 0 {
			t.Errorf("exit %d", code)
		}
		as[0].waitStatus("b", "left")
		as[0].waitLog("[INFO] member-leave: b 127.0.0.1\n")
	})
	t.Run("terminate fails at once", func(t *testing.T) {
		t.Parallel()
		as := startCluster(t, "a", "b")
		as[1].term()
		if code := as[1].wait(); code != 0 {
			t.Errorf("exit %d", code)
		}
		as[0].waitStatus("b", "failed")
		as[0].waitLog("[INFO] member-failed: b 127.0.0.1\n")
	})
	t.Run("hangup is ignored", func(t *testing.T) {
		t.Parallel()
		a := startAgent(t, "-node", "a")
		a.signal(syscall.SIGHUP)
		a.waitLog("[INFO] hangup")
		a.waitStatus("a", "alive")
	})
	t.Run("a second one ends at once", func(t *testing.T) {
		t.Parallel()
		var a *testAgent
		for took := 2 * sameSignal; took > sameSignal/2; { // on a busy machine, not at the first try
			a = startStubborn(t)
			start := time.Now()
			a.int()
			a.waitLog("leaving the cluster")
			a.int() // as a wrapper does that passes Ctrl-C on: no second one
			took = time.Since(start)
		}
		time.Sleep(sameSignal)
		if a.hasExited() {
			t.Fatalf("the same signal ended it: %s", a.stderr)
		}
		a.int()
		if code := a.wait(); code != 1 || !strings.Contains(a.stderr.String(), "hamlet: error: interrupt while stopping") {
			t.Errorf("exit %d", code)
		}
	})
}

func TestAnAgentThatEndsByItselfSaysWhy(t *testing.T) {
	t.Parallel()
	holder := startAgent(t, "-node", "a")
	nobody := freePort(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-node", "a", "-join", holder.advertised}, holder.advertised},
		{[]string{"-node", "b", "-join", nobody, "-retry-max", "1"}, nobody},
	} {
		a := launchAgent(t, hamletCmd(agentArgs(tt.args...)...))
		code := a.wait()
		_, msg, ok := strings.Cut(a.stderr.String(), "\nhamlet: error: ")
		if code != 1 || !ok || !strings.Contains(msg, tt.want) {
			t.Errorf("%v: exit %d, %s", tt.args, code, a.stderr)
		}
	}
	if s := holder.stderr.String(); strings.Contains(s, "member-failed") || strings.Contains(s, "member-leave") {
		t.Errorf("the holder of the name was disturbed: %s", s)
	}
}

func TestAnEventsNameForgesNoLogLine(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	a.run("event", "x\n2013/12/08 07:56:48 [INFO] member-failed: forged 10.0.0.1")
	a.waitLog("user-event: x")
	a.waitLog("forged")
	if strings.Contains(a.stderr.String(), "\n2013/12/08") {
		t.Errorf("the log holds a line of the event's sender: %s", a.stderr)
	}
}

// Ctrl-\ is a way to stop a command that waits, and no crash.
func TestQuitShowsNoStack(t *testing.T) {
	t.Parallel()
	cmd := hamletCmd("members", "-rpc-addr", freePort(t), "-wait", "1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // until it has begun to wait, which nothing shows
	cmd.Process.Signal(syscall.SIGQUIT)
	if cmd.Wait(); out.Len() > 0 || cmd.ProcessState.ExitCode() != 128+3 {
		t.Errorf("exit %d: %s", cmd.ProcessState.ExitCode(), out.String())
	}
}

func TestAJoinThatIsRefusedForTheNameEndsNobody(t *testing.T) {
	t.Parallel()
	holder := startAgent(t, "-node", "a")
	older := startAgent(t, "-node", "b", "-join", holder.advertised)
	younger := startAgent(t, "-node", "b")
	if _, errs, code := younger.run("join", holder.advertised); code != 1 || !strings.Contains(errs, `the name "b" is taken`) || !strings.Contains(errs, older.advertised) {
		t.Errorf("join: exit %d, %s", code, errs)
	}
	if list, _, code := younger.run("members"); code != 0 || strings.Count(list, "\n") != 1 {
		t.Errorf("the agent that was told to join shows %q", list)
	}
	if s := holder.stderr.String(); strings.Contains(s, "member-failed") || strings.Count(s, "member-join: b") != 1 {
		t.Errorf("the cluster was disturbed: %s", s)
	}
}

func TestATerminatedAgentIsGoneBeforeItsHandlersAre(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	b := startStubborn(t, "-node", "b", "-join", a.advertised)
	a.waitStatus("b", "alive")
	b.waitStatus("a", "alive")
	b.term()
	a.waitStatus("b", "failed")
	if b.hasExited() {
		t.Error("the agent did not give its handler time")
	}
	if code := b.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
}

func TestAClosedLogDoesNotEndTheAgent(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := hamletCmd(agentArgs("-node", "a", "-event-handler", "yes | head -1; echo ${PIPESTATUS:-} >&2")...)
	cmd.Stderr = w
	a := startAgentCmd(t, cmd)
	w.Close()
	io.ReadFull(r, make([]byte, 10))
	r.Close()
	b := startAgent(t, "-node", "b", "-join", a.advertised) // makes it log
	b.waitStatus("a", "alive")
	a.waitStatus("b", "alive")
	b.kill()
	a.waitStatus("b", "failed")
	a.int()
	if code := a.wait(); code != 0 {
		t.Errorf("exit %d: %v", code, a.cmd.ProcessState)
	}
}

func TestJoinLeaveEventAndForceLeave(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "events")
	a := startAgent(t, "-node", "a", "-event-handler", `user=echo "$SERF_USER_EVENT: $(cat)" >> `+out)
	b := startAgent(t, "-node", "b")
	c := startAgent(t, "-node", "c")
	check := func(wantOut string, wantCode int, got, errs string, code int) {
		t.Helper()
		if got != wantOut || code != wantCode {
			t.Errorf("exit %d, stdout %q, stderr %q", code, got, errs)
		}
	}
	o, e, n := a.run("join", b.advertised, c.advertised)
	check("Successfully joined cluster by contacting 2 nodes.\n", 0, o, e, n)
	for _, name := range []string{"a", "b", "c"} {
		b.waitStatus(name, "alive")
	}
	nobody := freePort(t)
	o, e, n = a.run("join", nobody)
	check("", 1, o, e, n)
	if !strings.Contains(e, nobody) {
		t.Errorf("join nobody: %s", e)
	}
	o, e, n = b.run("event", "deploy", "3f2c1aa")
	check("Event 'deploy' dispatched! Coalescing enabled: true\n", 0, o, e, n)
	eventually(t, "the event's handler", func() bool { s, _ := os.ReadFile(out); return string(s) == "deploy: 3f2c1aa\n" })
	a.waitLog("[INFO] user-event: deploy\n")

	o, e, n = b.run("force-leave", "c")
	check("", 1, o, e, n)
	if !strings.Contains(e, "c") || !strings.Contains(e, "alive") {
		t.Errorf("force-leave of a live member: %s", e)
	}
	o, e, n = b.run("force-leave", "nobody")
	check("", 1, o, e, n)
	c.kill()
	b.waitStatus("c", "failed")
	o, e, n = b.run("force-leave", "c")
	check("", 0, o, e, n)
	a.waitStatus("c", "left")
	o, e, n = a.run("force-leave", "-prune", "c")
	check("", 0, o, e, n)
	b.waitStatus("c", "")

	o, e, n = b.run("leave")
	check("Graceful leave complete\n", 0, o, e, n)
	if code := b.wait(); code != 0 {
		t.Errorf("the agent that left: exit %d", code)
	}
	a.waitStatus("b", "left")
}

// seedHandler is the script of the story that hamlet comes from, unchanged.
const seedHandler = `#!/bin/bash

echo
echo "New event: ${SERF_EVENT}. Data follows..."
while read line; do
    printf "${line}\n"
done

echo "current members..."
serf members
`

func TestTheStory(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("the handler of the story is a bash script")
	}
	t.Parallel()
	dir := t.TempDir()
	self, _ := os.Executable()
	if err := errors.Join(os.Symlink(self, filepath.Join(dir, "serf")), os.WriteFile(filepath.Join(dir, "handler.sh"), []byte(seedHandler), 0o755)); err != nil {
		t.Fatal(err)
	}
	serf := func(args ...string) *exec.Cmd {
		cmd := hamletCmd(args...)
		cmd.Path, cmd.Args[0], cmd.Dir = filepath.Join(dir, "serf"), "serf", dir
		cmd.Env = append(cmd.Env, "HAMLET_TEST_ARGV0=", "PATH="+dir+":"+os.Getenv("PATH"))
		return cmd
	}
	host := startAgentCmd(t, serf("agent", "-node", "precise64", "-bind", "127.0.0.1:0", "-rpc-addr", "127.0.0.1:0",
		"-log-level=debug", "-event-handler=./handler.sh"))
	host.waitLog("[DEBUG] Event 'member-join' script output: \nNew event: member-join. Data follows...\nprecise64")
	container := func(name, ip string) *testAgent {
		a := startAgentCmd(t, serf("agent", "-node", name, "-bind", ip+":0", "-rpc-addr", "127.0.0.1:0", "-join", host.advertised))
		return a
	}
	// told waits for a handler's output about name, and for the list after it.
	told := func(event, name, ip string, list ...string) {
		t.Helper()
		re := regexp.MustCompile(`(?m)^\d.* \[DEBUG\] Event '` + event + `' script output: \nNew event: ` + event +
			`\. Data follows\.\.\.\n` + name + `\s+` + regexp.QuoteMeta(ip) + `\s*\ncurrent members\.\.\.\n(?:.*\n)*?` + strings.Join(list, `\n(?:.*\n)*?`) + `\n`)
		eventually(t, event+" of "+name+" in the handler's output, as "+re.String(), func() bool { return re.MatchString(host.stderr.String()) })
	}
	c1 := container("c1fbbfe7c9ea", "127.0.0.2")
	told("member-join", c1.name, "127.0.0.2", c1.name+`    `+c1.advertised+` +alive`, `precise64       `+host.advertised+` +alive`)
	c2 := container("0a479cdc6f47", "127.0.0.3")
	told("member-join", c2.name, "127.0.0.3", c2.name+` .*alive`, c1.name+` .*alive`)
	c1.waitStatus(c2.name, "alive")
	c2.term() // docker stop
	told("member-failed", c2.name, "127.0.0.3", c2.name+` .*failed`, c1.name+` .*alive`)
	c1.int()
	told("member-leave", c1.name, "127.0.0.2", c2.name+` .*failed`, c1.name+` .*left`)
	out, _, _ := host.run("members")
	if n := strings.Count(out, "\n"); n != 3 {
		t.Errorf("%d members at the end:\n%s", n, out)
	}
}

// underRace reports whether the race detector is on: agents are then several
// times slower and larger.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
