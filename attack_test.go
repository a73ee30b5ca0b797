// attack_test.go: what strangers and bad bytes can do to real agents: hostile
// input on all ports, floods of connections, recordings played back, wrong keys.

package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
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
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

var testKeys = []string{
	base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("old key "), 4)),
	base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("new key "), 4)),
}

// startKeyed starts an agent with keys from the environment; none is no key.
func startKeyed(t *testing.T, keys []string, args ...string) *testAgent {
	t.Helper()
	cmd := hamletCmd(agentArgs(args...)...)
	if len(keys) > 0 {
		cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+strings.Join(keys, ","))
	}
	return startAgentCmd(t, cmd)
}

// startKeyedCluster is startCluster with keys.
func startKeyedCluster(t *testing.T, keys []string, names ...string) (all []*testAgent) {
	t.Helper()
	for _, name := range names {
		args := []string{"-node", name}
		if len(all) > 0 {
			args = append(args, "-join", all[0].advertised)
		}
		all = append(all, startKeyed(t, keys, args...))
	}
	for _, a := range all {
		for _, name := range names {
			a.waitStatus(name, "alive")
		}
	}
	return all
}

// count is how many lines of the agent's log hold text.
func (a *testAgent) count(text string) int { return strings.Count(a.stderr.String(), text) }

// memberLines are the lines of its log about members and events.
func (a *testAgent) memberLines() (lines []string) {
	for line := range strings.Lines(a.stderr.String()) {
		if strings.Contains(line, "] member-") || strings.Contains(line, "] user-event") {
			lines = append(lines, line)
		}
	}
	return lines
}

// hostileInput makes the i-th of the bytes that strangers send.
type hostileInput struct {
	rng  *rand.Rand
	c    *codec
	seal *seal
	to   []string // members' names
}

func newHostileInput(seed uint64, keys []string, names ...string) *hostileInput {
	ks, _ := parseKeys(keys)
	s, _ := newSeal("", ks)
	return &hostileInput{rng: rand.New(rand.NewPCG(seed, 7)), c: newCodec(), seal: s, to: names}
}

func (h *hostileInput) name() string { return h.to[h.rng.IntN(len(h.to))] }

// message is what a member could have said.
func (h *hostileInput) message() []byte {
	now := uint64(time.Now().UnixMilli())
	m := head{Kind: kind(h.rng.IntN(14)), From: h.name(), Incarnation: now, Target: h.name(), Seq: h.rng.Uint32(), Promise: 500, Nonce: h.rng.Uint64()}
	b := h.c.head(nil, &m)
	for range h.rng.IntN(3) {
		addr, _ := netip.MustParseAddrPort("127.0.0.1:9").MarshalBinary()
		u := update{Name: h.name(), Addr: string(addr), Incarnation: now, Status: Status(h.rng.IntN(7)), Tags: "role=web"}
		if h.rng.IntN(4) == 0 {
			u = update{Name: h.name(), Event: "deploy", Payload: make([]byte, h.rng.IntN(900)), LTime: h.rng.Uint64N(1000)}
		}
		b = h.c.update(b, &u)
	}
	return b
}

// hostileKinds are what next makes, in this order.
var hostileKinds = []string{"random", "mutated capture", "huge length", "HTTP", "TLS hello", "type definitions"}

func (h *hostileInput) next(port string, i int) []byte {
	b := make([]byte, h.rng.IntN(1500))
	for i := range b {
		b[i] = byte(h.rng.Uint32())
	}
	switch hostileKinds[i%len(hostileKinds)] {
	case "mutated capture":
		switch port {
		case "udp":
			b = h.seal.closeDatagram(h.message(), h.name())
		case "tcp":
			b = append([]byte(preamble), h.seal.closeFrame(h.message(), true)...)
		default:
			b = rpcBytes("", packRequest(request{Op: "members", Payload: b}))
		}
		for range 1 + h.rng.IntN(3) {
			b[h.rng.IntN(len(b))] ^= 1 << h.rng.IntN(8)
		}
	case "huge length":
		huge := slices.Concat([]byte{0xf8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, b)
		switch port {
		case "udp":
			b = append([]byte{protocolVersion, h.seal.tag[0], h.seal.tag[1], h.seal.tag[2], h.seal.tag[3]}, huge...)
		case "tcp":
			b = append([]byte(preamble+"hm\x01\x00\x7f\xff\xff\xff"), huge...)
			if i&8 > 0 {
				b = append([]byte(preamble), h.seal.closeFrame(huge, true)...)
			}
		default:
			b = rpcBytes("", huge)
		}
	case "HTTP":
		b = append([]byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"), rpcBytes("", packRequest(request{Op: "leave"}))...)
	case "TLS hello":
		b = append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, b...)
	case "type definitions":
		b = slices.Concat([]byte{protocolVersion}, h.seal.tag[:], wireTypes.definitions)
		if port != "udp" {
			b = append([]byte(preamble), h.seal.closeFrame(wireTypes.definitions, true)...)
		}
	}
	return b
}

// attack is a flow of hostile inputs to all ports of some agents.
type attack struct {
	count int
	began atomic.Int64 // inputs so far
	done  chan struct{}
	took  time.Duration
	sent  map[string]int // by port and kind
}

func startAttack(count int, keys []string, agents ...*testAgent) *attack {
	at := &attack{count: count, done: make(chan struct{}), sent: make(map[string]int)}
	var names []string
	for _, a := range agents {
		names = append(names, a.name)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := time.Now()
	for w := range 4 {
		wg.Go(func() {
			in, mine := newHostileInput(uint64(w), keys, names...), make(map[string]int)
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

func (at *attack) over() bool {
	select {
	case <-at.done:
		return true
	default:
		return false
	}
}

func (at *attack) String() string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(at.sent)) {
		parts = append(parts, fmt.Sprintf("%s %d", k, at.sent[k]))
	}
	return fmt.Sprintf("%d inputs in %v: %s", at.count, at.took.Round(time.Millisecond), strings.Join(parts, ", "))
}

// throw sends b and hangs up: politely, with a reset, or after an answer.
func throw(a *testAgent, port string, b []byte, i int) bool {
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
func TestUnderHostileInputAClusterStaysOneAndTakesNewMembers(t *testing.T) {
	count := envInt("HOSTILE_N", 5000)
	for name, keys := range map[string][]string{"with a key": testKeys[:1], "without a key": nil} {
		t.Run(name, func(t *testing.T) {
			agents := startKeyedCluster(t, keys, "red", "green", "blue")
			used, asked := watchUsage(t, agents...), agents[0].watchMembers()
			at := startAttack(count/2, keys, agents...)
			eventually(t, "a tenth of the attack", func() bool { return at.began.Load() > int64(count/20) })
			start := time.Now()
			late := startKeyed(t, keys, "-node", "late", "-join", agents[0].advertised)
			agents[2].waitStatus("late", "alive")
			t.Logf("a member joined in %v, the attack went on: %v", time.Since(start).Round(time.Millisecond), !at.over())
			<-at.done
			t.Log(at)
			asked.check(t)
			for _, a := range append(agents, late) {
				for _, m := range []string{"red", "green", "blue", "late"} {
					a.waitStatus(m, "alive")
				}
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
	failed     error
}

func (a *testAgent) watchMembers() *watch {
	w := &watch{quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			start := time.Now()
			if _, err := callRPC(a.rpc, "", request{Op: "members"}, rpcTimeout); err != nil {
				w.failed = err
			}
			w.count, w.worst = w.count+1, max(w.worst, time.Since(start))
			select {
			case <-w.quit:
				return
			case <-time.After(10 * ms):
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
	if w.failed != nil {
		t.Errorf("members took up to %v: %v", w.worst, w.failed)
	}
}

// usage is what processes take of memory and file descriptors.
type usage struct {
	agents      []*testAgent
	rss, most   []int // kB, at the start and at most
	fds         []int
	quit, ended chan struct{}
}

// watchUsage looks at /proc; elsewhere than on Linux it sees nothing.
func watchUsage(t *testing.T, agents ...*testAgent) *usage {
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

func (a *testAgent) rss() (kB int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	fmt.Sscan(after, &kB)
	return kB
}

func (a *testAgent) fds() int {
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

// The same in this process, where goroutines can be counted.
func TestHostileInputLeavesNoGoroutineBehind(t *testing.T) {
	nowhere := log.New(io.Discard, "", 0)
	g, err := StartGossip(GossipConfig{Name: "red", Bind: netip.MustParseAddrPort("127.0.0.1:0"), ReapAfter: time.Hour, Log: nowhere, Events: func(Event) {}})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := serveRPC(ln, g, "", nowhere)
	defer server.Close()
	before := runtime.NumGoroutine()
	at := startAttack(600, nil, &testAgent{name: "red", bind: g.Self().Addr.String(), rpc: ln.Addr().String()})
	<-at.done
	eventually(t, fmt.Sprintf("%d goroutines, as before", before), func() bool { return runtime.NumGoroutine() <= before })
}

// stickers are connections that somebody holds open as long as he may: idle
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
			for !s.over() {
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
	for at := 0; !s.over(); at++ {
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

func (s *stickers) over() bool {
	select {
	case <-s.quit:
		return true
	default:
		return false
	}
}

func (s *stickers) stop() { close(s.quit); s.all.Wait() }

func TestConnectionsThatAreHeldOpenKeepNobodyOut(t *testing.T) {
	t.Parallel()
	agents := startCluster(t, "red", "green")
	red := agents[0]
	used := watchUsage(t, red)
	frame := newHostileInput(1, nil, "red").seal.closeFrame(newCodec().head(nil, &head{Kind: kLook, From: "x"}), true)
	floods := map[string]*stickers{
		"gossip, idle or at the preamble": stickTo(700, red.bind, "", preamble),
		"gossip, in a frame":              stickTo(300, red.bind, preamble+string(frame[:frameHeader]), string(frame[frameHeader:])),
		"gossip, after a hello":           stickTo(100, red.bind, preamble+string(frame), ""),
		"RPC":                             stickTo(200, red.rpc, "", rpcMagic+strings.Repeat("x", 99)),
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
	eventually(t, "idle connections are closed", func() bool { return floods["gossip, idle or at the preamble"].closed.Load() > 350 })
	asked.check(t)
	for name, f := range floods {
		f.stop()
		t.Logf("%s: %d connections, %d of them closed by the agent", name, f.opened.Load(), f.closed.Load())
	}
	used.check(t)
}

// Whoever has no key to get past says hello as a member does, and then sends
// tables as fast as they are taken.
func TestTablesThatPourInFillNoMemoryAndDelayNoAnswer(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "red")
	used, asked := watchUsage(t, a), a.watchMembers()
	quit := make(chan struct{})
	var frames atomic.Int64
	var all sync.WaitGroup
	for range 300 {
		all.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
					pour(a.bind, &frames, quit)
				}
			}
		})
	}
	eventually(t, "three thousand pieces of tables", func() bool { return frames.Load() > 3_000 })
	asked.check(t)
	close(quit)
	all.Wait()
	t.Logf("%d frames of up to %d bytes", frames.Load(), maxFrame)
	used.check(t)
}

func pour(addr string, frames *atomic.Int64, quit chan struct{}) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		time.Sleep(10 * ms)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(4 * time.Second))
	h := newHostileInput(1, nil, "red")
	c.Write(append([]byte(preamble), h.seal.closeFrame(h.c.head(nil, &head{Kind: kExchange, From: "x", Nonce: 5, Digest: 1}), true)...))
	b, err := h.seal.readFrame(c, false, func() {})
	if err != nil {
		return
	}
	w, _, _ := h.c.readHead(b)
	f := h.c.head(nil, &head{Kind: kTable, From: "x", Echo: w.Nonce, More: true})
	u := h.c.update(nil, &update{Name: "y", Addr: "\x7f\x00\x00\x01\x00\x09", Incarnation: 9, Status: StatusPruned})
	f = h.seal.closeFrame(append(f, bytes.Repeat(u, (maxFrame-len(f))/len(u))...), true)
	for {
		select {
		case <-quit:
			return
		default:
		}
		if _, err := c.Write(f); err != nil {
			return
		}
		frames.Add(1)
	}
}

func TestAStrangerIsCutOffAfterTwoSeconds(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	frame := newHostileInput(1, nil, "x").seal.closeFrame(newCodec().head(nil, &head{Kind: kLook, From: "x"}), true)
	for what, first := range map[string]string{
		"who says nothing":           "",
		"who says half of a frame":   preamble + string(frame[:len(frame)-1]),
		"who says hello and no more": preamble + string(frame),
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

// fakeServer answers everybody who connects with the same bytes.
func fakeServer(t *testing.T, says string) (addr string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 1<<10))
			io.WriteString(c, says)
			time.AfterFunc(100*ms, func() { c.Close() })
		}
	}()
	return ln.Addr().String()
}

func TestEachFailedJoinSaysWhatIsWrongAndWhatToDo(t *testing.T) {
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
		joiner       *testAgent
		addr, remedy string
	}{
		{other, keyed.bind, "has another key: give both the same -encrypt"},
		{plain, keyed.bind, "start this one with -encrypt"},
		{keyed, plain.bind, "start that one with -encrypt"},
		{apart, plain.bind, "give both the same -cluster"},
		{plain, fakeServer(t, "hm\x02\x00\x00\x00\x00\x00"), "run the same hamlet on both sides"},
		{plain, ln.Addr().String(), "is this the right port"},
	} {
		for range 3 {
			start := time.Now()
			_, errs, code := c.joiner.run("join", c.addr)
			if took := time.Since(start); code != 1 || took > 2*time.Second || !strings.Contains(errs, c.addr) || !strings.Contains(errs, c.remedy) {
				t.Errorf("join %s, want %q: exit %d after %v: %s", c.addr, c.remedy, code, took, errs)
			}
			said[strings.ReplaceAll(errs, c.addr, "")] = true
		}
	}
	if len(said) != 6 {
		t.Errorf("six reasons, but %d different errors: %v", len(said), said)
	}
	for _, a := range []*testAgent{plain, keyed} {
		if n := a.count("[WARN]"); n != 1 {
			t.Errorf("%s was bothered often by one peer and wrote %d lines:\n%s", a.name, n, a.stderr)
		}
	}
}

func TestAPeerOfAnotherVersionIsToldSo(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	c, err := net.Dial("tcp", a.bind)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "HAMLET/2\r\n\r\nhm\x02\x00\x00\x00\x00\x04abcd")
	c.SetReadDeadline(time.Now().Add(4 * time.Second))
	if got, _ := io.ReadAll(c); string(got) != "hm\x01"+string(denyVersion)+"\x00\x00\x00\x00" {
		t.Errorf("it is told %q", got)
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
			for _, a := range agents {
				for _, name := range names {
					a.waitStatus(name, "alive")
				}
			}
		}
	}
	if _, errs, code := startKeyed(t, old, "-node", "late").run("join", agents[0].bind); code != 1 || !strings.Contains(errs, "another key") {
		t.Errorf("the old key still opens: %s", errs)
	}
}

func TestAKeyFromTheEnvironmentShowsNowhere(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "env")
	cmd := hamletCmd(agentArgs("-node", "red", "-log-level", "trace", "-event-handler", "member-join=env >>"+out+"; ps ax >>"+out+"; cat /proc/$PPID/cmdline >>"+out)...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+testKeys[0]+","+testKeys[1], "HAMLET_RPC_AUTH=tok-tok-token")
	a := startAgentCmd(t, cmd)
	seen := func() string { b, _ := os.ReadFile(out); return string(b) }
	eventually(t, "the handler ran", func() bool { return strings.Contains(seen(), "SERF_EVENT=member-join") })
	for _, keys := range [][]string{nil, {base64.StdEncoding.EncodeToString(make([]byte, 32))}} { // strangers make it talk about keys
		startKeyed(t, keys, "-node", "stranger").run("join", a.bind)
	}
	a.waitLog("[WARN] dropped")
	_, errs, _ := a.run("members")
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.cmd.Process.Pid))
	raw, _ := parseKeys(testKeys)
	for what, text := range map[string]string{"the log": a.stderr.String(), "stdout": a.stdout.String(), "its command line": string(cmdline), "what a handler sees": seen(), "an error": errs} {
		for i, key := range testKeys {
			if strings.Contains(text, key[:12]) || strings.Contains(text, string(raw[i])) || strings.Contains(text, fmt.Sprintf("%x", raw[i])) {
				t.Errorf("%s shows a key: %s", what, text)
			}
		}
		if strings.Contains(text, "tok-tok-token") && what != "what a handler sees" { // which may ask its agent
			t.Errorf("%s shows the token: %s", what, text)
		}
	}
}

func TestOtherProtocolsAtTheRPCCauseNothing(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "red")
	leave := rpcBytes("", packRequest(request{Op: "leave"}))
	for _, first := range []string{"POST / HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "\n", preamble} {
		c, err := net.Dial("tcp", a.rpc)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, first+string(leave))
		c.SetDeadline(time.Now().Add(4 * time.Second))
		if got, _ := io.ReadAll(c); len(got) > 0 {
			t.Errorf("%q is answered with %q", first, got)
		}
		c.Close()
	}
	resp, err := http.Post("http://"+a.rpc+"/"+rpcMagic[:5], "text/plain", bytes.NewReader(leave))
	if err == nil {
		t.Errorf("HTTP is answered: %s", resp.Status)
	}
	if a.status("red") != "alive" {
		t.Error("the agent has left")
	}
}

func TestAnRPCThatOthersReachWithoutATokenIsWarnedOf(t *testing.T) {
	t.Parallel()
	const warning = "without a token"
	open := startAgent(t, "-rpc-addr", "0.0.0.0:0")
	open.waitLog(warning)
	for _, a := range []*testAgent{startAgent(t), startAgent(t, "-rpc-addr", "0.0.0.0:0", "-rpc-auth", "sesame")} {
		a.waitLog("member-join")
		if a.count(warning) > 0 {
			t.Errorf("it warns:\n%s", a.stderr)
		}
	}
}

func TestWhatIsTooLongOrUnfitIsRefusedAtTheStartWithLimitAndSize(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		option, value string
		want          []string
	}{
		{"-node", strings.Repeat("n", maxName+1), []string{"129", "128"}},
		{"-node", strings.Repeat("é", 65), []string{"130", "128"}},
		{"-node", "a b", []string{"blanks"}},
		{"-node", "a\tb", []string{"blanks"}},
		{"-node", "a\x1b[31m", []string{"control"}},
		{"-node", "a\u202eb", []string{"control"}},
		{"-node", "a\xff", []string{"UTF-8"}},
		{"-tag", "k=" + strings.Repeat("v", maxTags-1), []string{"513", "512"}},
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
	startAgent(t, "-node", strings.Repeat("n", maxName), "-tag", "k="+strings.Repeat("v", maxTags-2))
}

// obeyable reports what a terminal could obey.
func obeyable(r rune) bool {
	return r != '\n' && r != '\t' && !unicode.IsGraphic(r)
}

func TestEscapeSequencesOfAForgedPeerReachNoTerminal(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "red", "-log-level", "debug", "-event-handler", "user=cat; printenv SERF_USER_EVENT")
	const esc = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e\r\x00\x7f\xff"
	h := newHostileInput(1, nil, "red")
	c, err := net.Dial("udp", a.bind)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	addr, _ := netip.MustParseAddrPort("127.0.0.1:9").MarshalBinary()
	for _, u := range []update{
		{Name: "evil", Addr: string(addr), Incarnation: 5, Status: StatusAlive, Tags: "k" + esc + "=v" + esc + "\x00role=" + esc},
		{Name: "evil" + esc, Addr: string(addr), Incarnation: 5, Status: StatusAlive},
		{Name: "evil", Event: "name" + esc, Payload: []byte("payload" + esc), LTime: 3},
	} {
		m := head{Kind: kFlood, From: "evil" + esc, Incarnation: 5}
		c.Write(h.seal.closeDatagram(h.c.update(h.c.head(nil, &m), &u), "red"))
	}
	a.waitStatus("evil", "failed") // nobody lives at that address
	a.waitLog("script output: payload")
	text, _, _ := a.run("members")
	json, _, _ := a.run("members", "-format", "json")
	for what, s := range map[string]string{"members": text, "JSON": json, "the log": a.stderr.String()} {
		if i := strings.IndexFunc(s, obeyable); i >= 0 || !utf8.ValidString(s) {
			t.Errorf("%s shows %q", what, s[max(i, 0):])
		}
		if what != "the log" && (!strings.Contains(s, "owned") || strings.Count(s, "evil") != 1) {
			t.Errorf("%s: %s", what, s)
		}
	}
}

// relay stands in front of an agent, which advertises its address. It records
// all that comes through, and can play the agent when that is dead.
type relay struct {
	addr, target string
	tcp          net.Listener
	udp          *net.UDPConn
	rec          *recording
	ghost        bool // nobody is there: answer with what was recorded
	asked        atomic.Int64
}

// recording is what was on the wire: datagrams, and each stream both ways.
type recording struct {
	mu        sync.Mutex
	datagrams [][]byte
	streams   [2][]*bytes.Buffer // what the dialler said, and what it was answered
}

func (r *recording) datagram(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.datagrams = append(r.datagrams, bytes.Clone(b))
}

func (r *recording) stream(way int) io.Writer {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := &bytes.Buffer{}
	r.streams[way] = append(r.streams[way], b)
	return writerFunc(func(p []byte) (int, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return b.Write(p)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// all returns all datagrams, and the streams of one way.
func (r *recording) all(way int) (datagrams, streams [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, b := range r.streams[way] {
		streams = append(streams, bytes.Clone(b.Bytes()))
	}
	return slices.Clone(r.datagrams), streams
}

func startRelay(t *testing.T, rec *recording, addr, target string, ghost bool) *relay {
	t.Helper()
	r := &relay{target: target, rec: rec, ghost: ghost}
	eventually(t, "a port for a relay", func() bool {
		var err error
		if r.tcp, err = net.Listen("tcp", addr); err != nil {
			return false
		}
		r.addr = r.tcp.Addr().String()
		if r.udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(r.addr))); err != nil {
			r.tcp.Close()
		}
		return err == nil
	})
	t.Cleanup(r.close)
	go r.serveUDP()
	go r.serveTCP()
	return r
}

func (r *relay) close() { r.tcp.Close(); r.udp.Close() }

func (r *relay) serveUDP() {
	outs := make(map[netip.AddrPort]net.Conn)
	defer func() {
		for _, c := range outs {
			c.Close()
		}
	}()
	for buf := make([]byte, 2000); ; {
		n, from, err := r.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue
		}
		r.asked.Add(1)
		if r.ghost {
			datagrams, _ := r.rec.all(0)
			for _, b := range datagrams {
				r.udp.WriteToUDPAddrPort(b, from)
			}
			continue
		}
		r.rec.datagram(buf[:n])
		if outs[from] == nil {
			c, err := net.Dial("udp", r.target)
			if err != nil {
				continue
			}
			outs[from] = c
			go func() {
				for back := make([]byte, 2000); ; {
					n, err := c.Read(back)
					if errors.Is(err, net.ErrClosed) {
						return
					} else if err == nil {
						r.rec.datagram(back[:n])
						r.udp.WriteToUDPAddrPort(back[:n], from)
					}
				}
			}()
		}
		outs[from].Write(buf[:n])
	}
}

func (r *relay) serveTCP() {
	for i := 0; ; i++ {
		c, err := r.tcp.Accept()
		if err != nil {
			return
		}
		r.asked.Add(1)
		go func() {
			defer c.Close()
			if r.ghost {
				_, answers := r.rec.all(1)
				c.Write(answers[i%len(answers)])
				io.Copy(io.Discard, c)
				return
			}
			to, err := net.Dial("tcp", r.target)
			if err != nil {
				return
			}
			defer to.Close()
			done := make(chan struct{}, 2)
			pipe := func(dst, src net.Conn, way int) {
				io.Copy(io.MultiWriter(r.rec.stream(way), dst), src)
				done <- struct{}{}
			}
			go pipe(to, c, 0)
			go pipe(c, to, 1)
			<-done
		}()
	}
}

// startRelayed starts a keyed agent behind a relay, which is what others see.
func startRelayed(t *testing.T, rec *recording, name string, args ...string) (*testAgent, *relay) {
	t.Helper()
	r := startRelay(t, rec, "127.0.0.1:0", freePort(t), false)
	return startKeyed(t, testKeys[:1], append([]string{"-node", name, "-bind", r.target, "-advertise", r.addr}, args...)...), r
}

// replay sends an agent all that was ever recorded, as if it came from others.
func replay(t *testing.T, rec *recording, a *testAgent) (datagrams, streams int) {
	t.Helper()
	ds, ss := rec.all(0)
	udp, err := net.Dial("udp", a.bind)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	for i, b := range ds {
		if udp.Write(b); i%50 == 49 { // a full socket would drop some
			time.Sleep(ms)
		}
	}
	for _, b := range ss {
		c, err := net.Dial("tcp", a.bind)
		if err != nil {
			t.Fatal(err)
		}
		c.Write(b)
		c.(*net.TCPConn).CloseWrite()
		c.SetReadDeadline(time.Now().Add(100 * ms))
		io.Copy(io.Discard, c)
		c.Close()
	}
	return len(ds), len(ss)
}

func TestWhatWasRecordedAndIsPlayedBackChangesNothing(t *testing.T) {
	t.Parallel()
	rec := &recording{}
	ran := filepath.Join(t.TempDir(), "ran")
	handler := []string{"-event-handler", "user=echo $SERF_USER_EVENT >>" + ran}
	red, at := startRelayed(t, rec, "red", handler...)
	green, greenAt := startRelayed(t, rec, "green", "-join", at.addr)
	blue, blueAt := startRelayed(t, rec, "blue", "-join", at.addr)
	gone, goneAt := startRelayed(t, rec, "gone", "-join", at.addr)
	all := []*testAgent{red, green, blue, gone}
	for _, a := range all {
		for _, b := range all {
			a.waitStatus(b.name, "alive")
		}
	}
	deploys := func() int { b, _ := os.ReadFile(ran); return strings.Count(string(b), "deploy") }
	blue.run("event", "deploy")
	eventually(t, "the event ran", func() bool { return deploys() == 1 })
	gone.int()
	gone.wait()
	goneAt.close()
	blue.kill()
	blueAt.close()
	for _, a := range []*testAgent{red, green} {
		a.waitStatus("blue", "failed")
		a.waitStatus("gone", "left")
	}
	before := [][]string{red.memberLines(), green.memberLines()}
	ghosts := []*relay{startRelay(t, rec, blueAt.addr, "", true), startRelay(t, rec, goneAt.addr, "", true)}
	for range 2 {
		for _, a := range []*testAgent{red, green} {
			d, s := replay(t, rec, a)
			t.Logf("%d datagrams and %d streams were played to %s", d, s, a.name)
		}
	}
	eventually(t, "the dead is called and its ghost answers", func() bool { return ghosts[0].asked.Load() >= 2 })
	green.run("event", "end")
	for i, a := range []*testAgent{red, green} {
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
