// attack_test.go: what strangers who speak the protocol can do to real agents.
// What takes no more than bytes is tested from outside.

package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// hostileInput makes the i-th of the bytes that strangers send.
type hostileInput struct {
	rng  *rand.Rand
	c    *codec
	seal *seal
	to   []string // members' names
}

func newHostileInput(seed uint64, names ...string) *hostileInput {
	s, _ := newSeal("", nil)
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
}

func startAttack(count int, agents ...*testAgent) *attack {
	at := &attack{count: count, done: make(chan struct{})}
	var names []string
	for _, a := range agents {
		names = append(names, a.name)
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			in := newHostileInput(uint64(w), names...)
			for i := int(at.began.Add(1) - 1); i < count; i = int(at.began.Add(1) - 1) {
				a, port := agents[i/18%len(agents)], []string{"udp", "tcp", "rpc"}[i/6%3]
				throw(a, port, in.next(port, i), i)
			}
		})
	}
	go func() { wg.Wait(); close(at.done) }()
	return at
}

// throw sends b and hangs up: politely, with a reset, or after an answer.
func throw(a *testAgent, port string, b []byte, i int) {
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
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	c.Write(b)
	if tc, ok := c.(*net.TCPConn); ok && i%3 == 0 {
		tc.SetLinger(0)
	} else if ok && i%3 == 1 {
		tc.CloseWrite()
		io.Copy(io.Discard, c)
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
	at := startAttack(600, &testAgent{name: "red", bind: g.Self().Addr.String(), rpc: ln.Addr().String()})
	<-at.done
	eventually(t, fmt.Sprintf("%d goroutines, as before", before), func() bool { return runtime.NumGoroutine() <= before })
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
	h := newHostileInput(1, "red")
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

// obeyable reports what a terminal could obey.
func obeyable(r rune) bool {
	return r != '\n' && r != '\t' && !unicode.IsGraphic(r)
}

func TestEscapeSequencesOfAForgedPeerReachNoTerminal(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "red", "-log-level", "debug", "-event-handler", "user=cat; printenv SERF_USER_EVENT")
	const esc = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e\r\x00\x7f\xff"
	h := newHostileInput(1, "red")
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
	text, json := a.run("members"), a.run("members", "-format", "json")
	for what, s := range map[string]string{"members": text, "JSON": json, "the log": a.stderr.String()} {
		if i := strings.IndexFunc(s, obeyable); i >= 0 || !utf8.ValidString(s) {
			t.Errorf("%s shows %q", what, s[max(i, 0):])
		}
		if what != "the log" && (!strings.Contains(s, "owned") || strings.Count(s, "evil") != 1) {
			t.Errorf("%s: %s", what, s)
		}
	}
}
