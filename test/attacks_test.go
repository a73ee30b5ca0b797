// attacks_test.go: what strangers and bad bytes can do to real agents: hostile
// input on all ports, floods of connections, recordings played back, wrong keys.

package test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

var testKeys = []string{
	base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("old key "), 4)),
	base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("new key "), 4)),
}

// hostileInput makes the i-th of the bytes that strangers send.
type hostileInput struct {
	rng *rand.Rand
	*captured
}

// hostileKinds are what next makes, in this order.
var hostileKinds = []string{"random", "mutated capture", "huge length", "HTTP", "TLS hello", "type definitions"}

func (h *hostileInput) next(port string, i int) []byte {
	b := make([]byte, h.rng.IntN(1500))
	for i := range b {
		b[i] = byte(h.rng.Uint32())
	}
	real := h.real(port)
	begun := real[:h.rng.IntN(len(real))]
	switch hostileKinds[i%len(hostileKinds)] {
	case "mutated capture":
		for range 1 + h.rng.IntN(3) {
			real[h.rng.IntN(len(real))] ^= 1 << h.rng.IntN(8)
		}
		return real
	case "huge length":
		huge := []string{"\x7f\xff\xff\xff", "\xff\xff\xff\xff", "\xf8\x7f\xff\xff\xff\xff\xff\xff\xff", "\xfc\x7f\xff\xff\xff"}[h.rng.IntN(4)]
		return slices.Concat(begun, []byte(huge), b)
	case "HTTP":
		return []byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n" + h.leave)
	case "TLS hello":
		return append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, b...)
	case "type definitions":
		return append(begun, gobTypes...)
	}
	return b
}

// real is what was once said on a port: all of it, or how it began.
func (h *hostileInput) real(port string) []byte {
	streams := h.streams
	switch port {
	case "udp":
		return bytes.Clone(h.datagrams[h.rng.IntN(len(h.datagrams))])
	case "rpc":
		streams = h.rpc
	}
	s := streams[h.rng.IntN(len(streams))]
	if h.rng.IntN(2) == 0 && len(s.hello) > 0 {
		return bytes.Clone(s.hello)
	}
	return bytes.Clone(s.said)
}

// gobTypes is a stream of gob that defines types before it has a value.
var gobTypes = func() []byte {
	var b bytes.Buffer
	gob.NewEncoder(&b).Encode(map[string][]struct{ Name, Addr string }{"x": {{"a", "b"}}})
	return b.Bytes()
}()

// attack is a flow of hostile inputs to all ports of some agents.
type attack struct {
	count int
	began atomic.Int64 // inputs so far
	done  chan struct{}
	took  time.Duration
	sent  map[string]int // by port and kind
}

func startAttack(count int, c *captured, agents ...*agent) *attack {
	at := &attack{count: count, done: make(chan struct{}), sent: make(map[string]int)}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := time.Now()
	for w := range 4 {
		wg.Go(func() {
			in, mine := &hostileInput{rand.New(rand.NewPCG(uint64(w), 7)), c}, make(map[string]int)
			for i := int(at.began.Add(1) - 1); i < count; i = int(at.began.Add(1) - 1) {
				a, port := agents[i/18%len(agents)], []string{"udp", "tcp", "rpc"}[i/6%3]
				if throw(a, port, in.next(port, i), i) {
					mine[port+" "+hostileKinds[i%len(hostileKinds)]]++
				} else {
					mine[port+" not sent"]++
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for k, n := range mine {
				at.sent[k] += n
			}
		})
	}
	go func() { wg.Wait(); at.took = time.Since(start); close(at.done) }()
	return at
}

func (at *attack) String() string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(at.sent)) {
		parts = append(parts, fmt.Sprintf("%s %d", k, at.sent[k]))
	}
	return fmt.Sprintf("%d inputs in %v: %s", at.count, at.took.Round(time.Millisecond), strings.Join(parts, ", "))
}

// throw sends b and hangs up: politely, with a reset, or after an answer.
func throw(a *agent, port string, b []byte, i int) bool {
	network, addr := "tcp", a.bind
	switch port {
	case "udp":
		network = "udp"
	case "rpc":
		addr = a.rpc
	}
	d := net.Dialer{Timeout: 2 * time.Second}
	if from := net.IPv4(127, 0, 0, byte(1+i%200)); runtime.GOOS != "linux" { // where all of 127.0.0.0/8 is this machine
	} else if d.LocalAddr = (&net.TCPAddr{IP: from}); port == "udp" {
		d.LocalAddr = &net.UDPAddr{IP: from}
	}
	c, err := d.Dial(network, addr)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	_, err = c.Write(b)
	if tc, ok := c.(*net.TCPConn); ok && i%3 == 0 {
		tc.SetLinger(0)
	} else if ok && i%3 == 1 {
		tc.CloseWrite()
		io.Copy(io.Discard, c)
	}
	return err == nil || port != "udp"
}

// The number of inputs is HOSTILE_N.
func TestClusterUnderHostileInputStaysOneAndTakesNewMembers(t *testing.T) {
	count := envInt("HOSTILE_N", 5000)
	for name, keys := range map[string][]string{"with a key": testKeys[:1], "without a key": nil} {
		t.Run(name, func(t *testing.T) {
			c := capture(t, keys...)
			agents := startKeyedCluster(t, keys, "red", "green", "blue")
			used, asked := watchUsage(t, agents...), agents[0].watchMembers()
			at := startAttack(count/2, c, agents...)
			eventually(t, "a tenth of the attack", func() bool { return at.began.Load() > int64(count/20) })
			start := time.Now()
			late := startKeyed(t, keys, "-node", "late", "-join", agents[0].advertised)
			agents[2].waitStatus("late", "alive")
			t.Logf("a member joined in %v, the attack went on: %v", time.Since(start).Round(time.Millisecond), !isClosed(at.done))
			<-at.done
			t.Log(at)
			asked.check(t)
			for _, a := range append(agents, late) {
				waitAlive(t, []string{"red", "green", "blue", "late"}, a)
				if n := len(a.members()); len(keys) > 0 && n != 4 {
					t.Errorf("%s has %d members", a.name, n)
				}
				warned, lines, limit := a.count("[WARN]"), a.count("\n"), 22*(1+int(time.Since(start)/time.Minute))
				t.Logf("%s wrote %d lines about strangers, %d in all", a.name, warned, lines)
				if warned > limit || len(keys) > 0 && lines > limit+20 || a.count("goroutine ") > 0 {
					t.Errorf("more than %d lines about strangers:\n%s", limit, a.stderr)
				}
			}
			used.check(t)
		})
	}
}

// watch asks for the members all the time.
type watch struct {
	quit, done chan struct{}
	count      int
	worst      time.Duration
	failed     string
}

func (a *agent) watchMembers() *watch {
	w := &watch{quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			start := time.Now()
			if out, err := askCmd(a.rpc, "members").CombinedOutput(); err != nil {
				w.failed = string(out)
			}
			w.count, w.worst = w.count+1, max(w.worst, time.Since(start))
			select {
			case <-w.quit:
				return
			case <-time.After(pause):
			}
		}
	}()
	return w
}

func (w *watch) check(t *testing.T) {
	t.Helper()
	close(w.quit)
	<-w.done
	t.Logf("members answered %d times meanwhile, at worst in %v", w.count, w.worst.Round(time.Microsecond))
	if w.failed != "" {
		t.Errorf("members took up to %v: %s", w.worst, w.failed)
	}
}

// usage is what processes take of memory and file descriptors.
type usage struct {
	agents      []*agent
	rss, most   []int // kB, at the start and at most
	fds         []int
	quit, ended chan struct{}
}

// watchUsage looks at /proc; elsewhere than on Linux it sees nothing.
func watchUsage(t *testing.T, agents ...*agent) *usage {
	u := &usage{agents: agents, quit: make(chan struct{}), ended: make(chan struct{})}
	for _, a := range agents {
		u.rss, u.most, u.fds = append(u.rss, a.rss()), append(u.most, 0), append(u.fds, a.fds())
	}
	go func() {
		defer close(u.ended)
		for {
			for i, a := range agents {
				u.most[i] = max(u.most[i], a.rss())
			}
			select {
			case <-u.quit:
				return
			case <-time.After(20 * ms):
			}
		}
	}()
	return u
}

func (a *agent) rss() (kB int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	fmt.Sscan(after, &kB)
	return kB
}

func (a *agent) fds() int {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
	return len(fds)
}

// check: nothing grew by 64 MB, and no connection stays.
func (u *usage) check(t *testing.T) {
	t.Helper()
	close(u.quit)
	<-u.ended
	for i, a := range u.agents {
		t.Logf("%s: %d kB, at most %d, now %d; %d file descriptors, now %d", a.name, u.rss[i], u.most[i], a.rss(), u.fds[i], a.fds())
		limit := 64 << 10
		if underRace() {
			limit *= 4 // the detector's own memory
		}
		if u.most[i]-u.rss[i] > limit {
			t.Errorf("%s grew from %d to %d kB", a.name, u.rss[i], u.most[i])
		}
		eventually(t, "its connections are closed", func() bool { return a.fds() <= u.fds[i]+6 }) // links with new members
	}
}

// stickers are connections that a stranger holds open as long as the agent lets it: idle
// ones, and ones that send a byte now and then. What is closed is made anew.
type stickers struct {
	opened, closed atomic.Int64
	quit           chan struct{}
	all            sync.WaitGroup
}

func stickTo(count int, addr, first, slowly string) *stickers {
	s := &stickers{quit: make(chan struct{})}
	for i := range count {
		s.all.Go(func() {
			for !isClosed(s.quit) {
				s.stick(addr, first, slowly, i)
				time.Sleep(20 * ms) // before the next try
			}
		})
	}
	return s
}

func (s *stickers) stick(addr, first, slowly string, i int) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return
	}
	defer c.Close()
	s.opened.Add(1)
	io.WriteString(c, first)
	for at := 0; !isClosed(s.quit); at++ {
		if i%2 == 0 && at < len(slowly) {
			io.WriteString(c, slowly[at:at+1])
		}
		c.SetReadDeadline(time.Now().Add(100 * ms))
		if _, err := c.Read(make([]byte, 1<<10)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			s.closed.Add(1)
			return
		}
	}
}

func (s *stickers) stop() { close(s.quit); s.all.Wait() }

func TestAcceptorTakesPeersWhileConnectionsAreHeldOpen(t *testing.T) {
	t.Parallel()
	c := capture(t)
	agents := startCluster(t, "red", "green")
	red, half := agents[0], len(c.hello)/2
	used := watchUsage(t, red)
	floods := map[string]*stickers{
		"gossip, idle or slow":   stickTo(700, red.bind, "", c.hello),
		"gossip, in a hello":     stickTo(300, red.bind, c.hello[:half], c.hello[half:]),
		"gossip, after a hello":  stickTo(100, red.bind, c.hello, ""),
		"RPC, also after a call": stickTo(200, red.rpc, "", string(c.rpc[0].said)+strings.Repeat("x", 99)),
	}
	for name, f := range floods {
		eventually(t, name, func() bool { return f.opened.Load() >= 150 })
	}
	asked := red.watchMembers()
	for _, name := range []string{"black", "white"} {
		start := time.Now()
		startAgent(t, "-node", name, "-join", red.advertised)
		agents[1].waitStatus(name, "alive")
		t.Logf("%s joined in %v", name, time.Since(start).Round(time.Millisecond))
	}
	eventually(t, "idle connections are closed", func() bool { return floods["gossip, idle or slow"].closed.Load() > 350 })
	asked.check(t)
	for name, f := range floods {
		f.stop()
		t.Logf("%s: %d connections, %d of them closed by the agent", name, f.opened.Load(), f.closed.Load())
	}
	used.check(t)
}

func TestAcceptorCutsStrangersOffAfterTwoSeconds(t *testing.T) {
	t.Parallel()
	hello := capture(t).hello
	a := startAgent(t)
	for what, first := range map[string]string{
		"who says nothing":           "",
		"who says half of a hello":   hello[:len(hello)-1],
		"who says hello and no more": hello,
	} {
		start := time.Now()
		c, err := net.Dial("tcp", a.bind)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, first)
		c.SetReadDeadline(start.Add(10 * time.Second))
		io.Copy(io.Discard, c)
		if took := time.Since(start); took > 6*time.Second { // two, and patience with a busy machine
			t.Errorf("%s is cut off after %v", what, took)
		}
	}
}

// ofAnotherVersion is an address at which a later version answers.
func ofAnotherVersion(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			io.WriteString(c, "HAMLET/9\r\n\r\n"+strings.Repeat("x", 100))
			c.Close()
		}
	}()
	return ln.Addr().String()
}

func TestJoinThatFailsSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	t.Parallel()
	plain, keyed := startAgent(t, "-node", "plain"), startKeyed(t, testKeys[:1], "-node", "keyed")
	other := startKeyed(t, testKeys[1:], "-node", "other")
	apart := startAgent(t, "-node", "apart", "-cluster", "elsewhere")
	web := &http.Server{Handler: http.NotFoundHandler()}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go web.Serve(ln)
	defer web.Close()
	said := make(map[string]bool)
	for _, c := range []struct {
		joiner       *agent
		addr, remedy string
	}{
		{other, keyed.bind, "has another key: give both the same -encrypt"},
		{plain, keyed.bind, "start this one with -encrypt"},
		{keyed, plain.bind, "start that one with -encrypt"},
		{apart, plain.bind, "give both the same -cluster"},
		{plain, ofAnotherVersion(t), "speaks protocol 9, this agent 5: upgrade this one"},
		{plain, ln.Addr().String(), "is this the right port"},
	} {
		for range 3 {
			start := time.Now()
			_, errs, code := c.joiner.run("join", c.addr)
			if took := time.Since(start); code != 1 || took > 2*time.Second*busy || !strings.Contains(errs, c.addr) || !strings.Contains(errs, c.remedy) {
				t.Errorf("join %s, want %q: exit %d after %v: %s", c.addr, c.remedy, code, took, errs)
			}
			said[strings.ReplaceAll(errs, c.addr, "")] = true
		}
	}
	if len(said) != 6 {
		t.Errorf("six reasons, but %d different errors: %v", len(said), said)
	}
	for _, a := range []*agent{plain, keyed} {
		if n := a.count("[WARN]"); n != 1 {
			t.Errorf("%s was bothered often by one peer and wrote %d lines:\n%s", a.name, n, a.stderr)
		}
	}
}

func TestKeysRotateByRollingRestartsWithoutLosingAMember(t *testing.T) {
	t.Parallel()
	old, both, turned, fresh := testKeys[:1], testKeys, []string{testKeys[1], testKeys[0]}, testKeys[1:]
	names := []string{"red", "green", "blue"}
	agents := startKeyedCluster(t, old, names...)
	for _, keys := range [][]string{both, turned, fresh} {
		for i := range agents {
			agents[i].int()
			agents[i].wait()
			if n := agents[i].count("member-failed") + agents[i].count("dropped"); n > 0 {
				t.Errorf("%s lost or dropped somebody:\n%s", names[i], agents[i].stderr)
			}
			agents[i] = startKeyed(t, keys, "-node", names[i], "-bind", agents[i].bind, "-join", agents[(i+1)%3].bind)
			waitAlive(t, names, agents...)
		}
	}
	if _, errs, code := startKeyed(t, old, "-node", "late").run("join", agents[0].bind); code != 1 || !strings.Contains(errs, "another key") {
		t.Errorf("the old key still opens: %s", errs)
	}
}

func TestKeyFromTheEnvironmentShowsNowhere(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "env")
	cmd := hamletCmd(agentArgs("-node", "red", "-log-level", "trace", "-event-handler", "member-join=env >>"+out+"; ps ax >>"+out+"; cat /proc/$PPID/cmdline >>"+out)...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+testKeys[0]+","+testKeys[1], "HAMLET_RPC_AUTH=tok-tok-token")
	a := startAgentCmd(t, cmd)
	seen := func() string { return readFile(out) }
	eventually(t, "the handler ran", func() bool { return strings.Contains(seen(), "SERF_EVENT=member-join") })
	for _, keys := range [][]string{nil, {base64.StdEncoding.EncodeToString(make([]byte, 32))}} { // strangers make it talk about keys
		startKeyed(t, keys, "-node", "stranger").run("join", a.bind)
	}
	a.waitLog("[WARN] dropped")
	_, errs, _ := a.run("members")
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.cmd.Process.Pid))
	for what, text := range map[string]string{"the log": a.stderr.String(), "stdout": a.stdout.String(), "its command line": string(cmdline), "what a handler sees": seen(), "an error": errs} {
		for _, key := range testKeys {
			raw, _ := base64.StdEncoding.DecodeString(key)
			if strings.Contains(text, key[:12]) || strings.Contains(text, string(raw)) || strings.Contains(text, fmt.Sprintf("%x", raw)) {
				t.Errorf("%s shows a key: %s", what, text)
			}
		}
		if strings.Contains(text, "tok-tok-token") && what != "what a handler sees" { // which may ask its agent
			t.Errorf("%s shows the token: %s", what, text)
		}
	}
}

func TestRPCPortIgnoresOtherProtocols(t *testing.T) {
	t.Parallel()
	was := capture(t)
	a := startAgent(t, "-node", "red")
	for _, first := range []string{"POST / HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "\n", was.hello} {
		c, err := net.Dial("tcp", a.rpc)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, first+was.leave)
		c.SetDeadline(time.Now().Add(4 * time.Second))
		// The hello of gossip may be answered with a challenge, as a command is.
		if got, _ := io.ReadAll(c); len(got) > 0 && first != was.hello || bytes.Contains(got, []byte("red")) {
			t.Errorf("%q is answered with %q", first, got)
		}
		c.Close()
	}
	resp, err := http.Post("http://"+a.rpc+"/", "text/plain", strings.NewReader(was.leave))
	if err == nil {
		t.Errorf("HTTP is answered: %s", resp.Status)
	}
	if a.status("red") != "alive" {
		t.Error("the agent has left")
	}
}

func TestAddressOpenToStrangersIsOneWarning(t *testing.T) {
	t.Parallel()
	const rpc, token = "the RPC listens on 0.0.0.0:", "without a token: anyone who can reach it controls this agent"
	const public = "is a public address, and there is no key"
	for _, c := range []struct {
		keys []string
		args string
		want []string
	}{
		{nil, "", nil},
		{nil, "-rpc-auth sesame", nil},
		{nil, "-rpc-addr 0.0.0.0:0", []string{rpc, token}},
		{nil, "-rpc-addr 0.0.0.0:0 -rpc-auth sesame", nil}, // setting both is deliberate
		{nil, "-advertise 203.0.113.7", []string{"[WARN] 203.0.113.7:", public}},
		{nil, "-bind [::1]:0 -advertise 2001:db8::7", []string{"[WARN] [2001:db8::7]:", public}},
		{nil, "-advertise 10.0.0.1", nil},
		{nil, "-advertise 192.168.0.1", nil},
		{testKeys[:1], "-advertise 203.0.113.7", nil},
	} {
		a := startKeyed(t, c.keys, append([]string{"-node", "a"}, strings.Fields(c.args)...)...)
		a.waitLog("member-join: a ")
		for _, w := range append(c.want, "[WARN]") {
			if n := a.count(w); n != min(len(c.want), 1) {
				t.Errorf("agent %s: %q %d times:\n%s", c.args, w, n, a.stderr)
			}
		}
		if a.count("sesame") > 0 {
			t.Errorf("agent %s:\n%s", c.args, a.stderr)
		}
	}
}

func TestOptionThatIsTooLongOrUnfitIsRefusedWithLimitAndSize(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		option, value string
		want          []string
	}{
		{"-node", strings.Repeat("n", 129), []string{"129", "128"}},
		{"-node", strings.Repeat("é", 65), []string{"130", "128"}},
		{"-node", "a b", []string{"blanks"}},
		{"-node", "a\tb", []string{"blanks"}},
		{"-node", "a\x1b[31m", []string{"control"}},
		{"-node", "a\u202eb", []string{"control"}},
		{"-node", "a\xff", []string{"UTF-8"}},
		{"-tag", "k=" + strings.Repeat("v", 511), []string{"513", "512"}},
		{"-tag", "=v", []string{"key"}},
	} {
		_, errs, code := hamlet(t, agentArgs(c.option, c.value)...)
		if code == 0 || !strings.HasPrefix(errs, "hamlet: error: ") || len(errs) > 400 {
			t.Errorf("%s %q: exit %d, %s", c.option, c.value, code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(errs, w) {
				t.Errorf("%s %q: %q is not in %s", c.option, c.value, w, errs)
			}
		}
		if i := strings.IndexFunc(errs, obeyable); i >= 0 {
			t.Errorf("%s %q: the error holds %q", c.option, c.value, errs[i:])
		}
	}
	startAgent(t, "-node", strings.Repeat("n", 128), "-tag", "k="+strings.Repeat("v", 510))
}

// obeyable reports what a terminal could obey.
func obeyable(r rune) bool {
	return r != '\n' && r != '\t' && !unicode.IsGraphic(r)
}

// memberLines are the lines of its log about members and events.
func (a *agent) memberLines() (lines []string) {
	for line := range strings.Lines(a.stderr.String()) {
		if strings.Contains(line, "] member-") || strings.Contains(line, "] user-event") {
			lines = append(lines, line)
		}
	}
	return lines
}

func TestReplayOfARecordingChangesNothing(t *testing.T) {
	t.Parallel()
	rec := &recording{}
	ran := filepath.Join(t.TempDir(), "ran")
	handler := []string{"-event-handler", "user=echo $SERF_USER_EVENT >>" + ran}
	red, at := startRelayed(t, rec, testKeys[:1], "red", handler...)
	green, greenAt := startRelayed(t, rec, testKeys[:1], "green", "-join", at.addr)
	blue, blueAt := startRelayed(t, rec, testKeys[:1], "blue", "-join", at.addr)
	gone, goneAt := startRelayed(t, rec, testKeys[:1], "gone", "-join", at.addr)
	waitAlive(t, []string{"red", "green", "blue", "gone"}, red, green, blue, gone)
	deploys := func() int { return strings.Count(readFile(ran), "deploy") }
	blue.run("event", "deploy")
	eventually(t, "the event ran", func() bool { return deploys() == 1 })
	gone.int()
	gone.wait()
	goneAt.close()
	blue.kill()
	blueAt.close()
	for _, a := range []*agent{red, green} {
		a.waitStatus("blue", "failed")
		a.waitStatus("gone", "left")
	}
	before := [][]string{red.memberLines(), green.memberLines()}
	ghost := startRelay(t, &relay{rec: rec, addr: blueAt.addr, ghost: true})
	startRelay(t, &relay{rec: rec, addr: goneAt.addr, ghost: true})
	for range 2 {
		for _, a := range []*agent{red, green} {
			d, s := replay(t, rec, a)
			t.Logf("%d datagrams and %d streams were played to %s", d, s, a.name)
		}
	}
	eventually(t, "the dead is called and its ghost answers", func() bool { return ghost.asked.Load() >= 2 })
	green.run("event", "end")
	for i, a := range []*agent{red, green} {
		a.waitLog("user-event: end")
		if diff := cmp.Diff(before[i], slices.DeleteFunc(a.memberLines(), func(l string) bool { return strings.Contains(l, ": end") })); diff != "" {
			t.Errorf("%s believed something:\n%s", a.name, diff)
		}
		for name, status := range map[string]string{"red": "alive", "green": "alive", "blue": "failed", "gone": "left"} {
			if got := a.status(name); got != status {
				t.Errorf("%s has %s as %s", a.name, name, got)
			}
		}
	}
	// Nor is one fooled that has just started and joined.
	green.kill()
	red.waitStatus("green", "failed")
	again := startKeyed(t, testKeys[:1], "-node", "green", "-bind", green.bind, "-advertise", greenAt.addr, "-join", at.addr)
	red.waitStatus("green", "alive")
	replay(t, rec, again)
	red.run("event", "end2")
	again.waitLog("user-event: end2")
	if n := again.count("user-event"); n != 1 || again.count("member-join: blue") > 0 || deploys() != 1 {
		t.Errorf("after a restart it believes what is over:\n%s", again.stderr)
	}
}

// The RPC's 256 connections did not come out of the budget of descriptors: with few of them, an agent whose RPC was held
// open could not be joined any more, and ran no handler.
func TestAcceptorLeavesDescriptorsForEverythingElse(t *testing.T) {
	t.Parallel()
	cmd := hamletCmd(agentArgs("-node", "a", "-log-level", "debug", "-event-handler", "*=echo $SERF_EVENT, limit $(ulimit -n)")...)
	// The soft limit is raised by the agent for itself, and its scripts have the one that they would have without it.
	cmd.Args = append([]string{"sh", "-c", `ulimit -Hn 80; ulimit -Sn 40; exec "$@"`, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	a := startAgentCmd(t, cmd)
	for _, addr := range []string{a.rpc, a.advertised} {
		for range 200 {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
	}

	b := startAgent(t, "-node", "b", "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, b)
	if out, stderr, code := a.run("event", "deploy"); code != 0 {
		t.Errorf("event: %s%s", out, stderr)
	}
	a.waitLog("script output: user, limit 40\n")
	if a.count("cannot accept") > 0 || a.count("cannot start") > 0 {
		t.Errorf("descriptors ran out:\n%s", a.stderr)
	}
}
