// rpc_test.go: sessions on real and piped connections: what is said, what is cut,
// what is played back, and what does not answer.

package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// logged collects what is logged; safe for concurrent use.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startTestGossip starts a node in this process, on free ports of loopback.
func startTestGossip(t testing.TB, name string, cfg gossipConfig) (*gossip, *logged) {
	t.Helper()
	l := &logged{}
	cfg.member.Name, cfg.log = name, testLogger(l)
	if !cfg.bind.IsValid() {
		cfg.bind = netip.MustParseAddrPort("127.0.0.1:0")
	}
	if cfg.reapAfter == 0 {
		cfg.reapAfter = time.Hour
	}
	if cfg.events == nil {
		cfg.events = func(ev Event, answer func(reply, []byte)) {
			if ev.kind == eventQuery {
				go answer(replyNothing, nil)
			}
		}
	}
	g, err := newGossip(cfg)
	if err != nil {
		t.Fatal(err)
	}
	go g.loop()
	t.Cleanup(g.close)
	return g, l
}

func address(g *gossip) netip.AddrPort { m, _ := g.self(); return m.Addr }

// seen are the statuses that g shows, by name.
func seen(g *gossip) map[string]Status {
	all := make(map[string]Status)
	g.run(func(n *node) error {
		for _, m := range n.members("", maxMembers) {
			all[m.Name] = m.Status
		}
		return nil
	})
	return all
}

// eventually waits for a condition that other goroutines or processes bring about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func testKey(b byte) [][]byte { return [][]byte{bytes.Repeat([]byte{b}, keySize)} }

func testDoor(cluster string, keys [][]byte, kind byte) *sealer {
	return &sealer{cluster, keys, kind, 4242}
}

// ---- the seal ----

// The derived key is written out here as RFC 5869, section 2.3, has it: one HMAC, since one is long enough.
func TestSealIsAnAESGCMUnderAKeyDerivedForItsReceiver(t *testing.T) {
	key := testKey(1)[0]
	sealed := (&sealer{cluster: "c", keys: [][]byte{key}}).seal(nil, []byte("hello"), "web1")[4:]
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("c\x00web1\x01"))
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	data, err := gcm.Open(nil, sealed[:12], sealed[12:], nil)
	if err != nil || string(data) != "hello" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestDatagramOpensForItsReceiversInstanceAlone(t *testing.T) {
	for name, keys := range map[string][][]byte{"with a key": testKey(1), "without": nil} {
		s, other := &sealer{cluster: "c", keys: keys}, &sealer{cluster: "d", keys: keys}
		b, ping := s.sealDatagram([]byte("hello"), Member{Name: "web1", Instance: 77}), s.sealDatagram([]byte("hello"), Member{Name: "web1", Instance: 0})
		for _, tt := range []struct {
			fact  string
			s     *sealer
			b     []byte
			name  string
			born  uint64
			opens bool
		}{
			{"its own", s, b, "web1", 77, true},
			{"another run", s, b, "web1", 78, false},
			{"another member", s, b, "web2", 77, false},
			{"another cluster", other, b, "web1", 77, false},
			{"a ping to any run", s, ping, "web1", 78, true},
			{"a ping to another member", s, ping, "web2", 78, false},
		} {
			data, anyRun, err := tt.s.openDatagram(tt.b, Member{Name: tt.name, Instance: tt.born})
			if (err == nil) != tt.opens || err != nil && !errors.Is(err, errNotForMe) || (string(data) == "hello") != tt.opens || tt.opens && anyRun != (&tt.b[0] == &ping[0]) {
				t.Errorf("%s, %s: %q, %v, %v", name, tt.fact, data, anyRun, err)
			}
		}
	}
	plain, keyed, wrong := &sealer{}, &sealer{keys: testKey(1)}, &sealer{keys: testKey(3)}
	both := &sealer{keys: append(testKey(2), testKey(1)...)}
	b := keyed.sealDatagram([]byte("a secret"), Member{Name: "a", Instance: 1})
	if data, _, err := plain.openDatagram(b, Member{Name: "a", Instance: 1}); err == nil && bytes.Contains(data, []byte("secret")) {
		t.Error("it is read without the key")
	}
	for want, s := range map[error]*sealer{nil: both, errOtherKey: wrong} {
		if _, _, err := s.openDatagram(b, Member{Name: "a", Instance: 1}); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	if _, _, err := keyed.openDatagram(plain.sealDatagram([]byte("x"), Member{Name: "a", Instance: 1}), Member{Name: "a", Instance: 1}); !errors.Is(err, errOtherKey) {
		t.Error(err)
	}
}

func BenchmarkASealedDatagram(b *testing.B) {
	d := testDoor("c", testKey(1), gossipPort)
	for b.Loop() {
		if _, _, err := d.openDatagram(d.sealDatagram(make([]byte, 40), Member{Name: "web1", Instance: 77}), Member{Name: "web1", Instance: 77}); err != nil {
			b.Fatal(err)
		}
	}
}

// joined has g join addr; n is how many answered.
func joined(g *gossip, addr string) (n int, err error) {
	r := g.join([]string{addr}, false)
	if len(r.errs) > 0 {
		err = errors.New(strings.Join(r.errs, "; "))
	}
	return len(r.names), err
}

// pipe returns both ends of a session over a pipe.
func pipe(t *testing.T, d, a *sealer) (dialler, acceptor *session, wires [2]net.Conn) {
	x, y := net.Pipe()
	t.Cleanup(func() { x.Close(); y.Close() })
	done := make(chan *session)
	go func() { done <- a.handshake(&session{conn: y}) }()
	dialler = d.handshake(&session{conn: x, dialled: true})
	return dialler, <-done, [2]net.Conn{x, y}
}

func TestHandshakeTellsEachSideWhatIsWrongWithTheOther(t *testing.T) {
	plain := testDoor("", nil, gossipPort)
	keyed := testDoor("", testKey(1), gossipPort)
	for _, tt := range []struct {
		d, a       *sealer
		atD, atA   error
		atDialText string
	}{
		{plain, plain, nil, nil, ""},
		{keyed, keyed, nil, nil, ""},
		{plain, keyed, errKeyless, errKeyed, ""},
		{keyed, plain, errKeyed, errKeyless, ""},
		{plain, testDoor("else", nil, gossipPort), errCluster, errCluster, ""},
		{plain, testDoor("", nil, rpcPort), errRPC, nil, "gossips on port 4242"},
	} {
		s, r, _ := pipe(t, tt.d, tt.a)
		if !errors.Is(s.err, tt.atD) || tt.atA != nil && !errors.Is(r.err, tt.atA) || (s.err == nil) != (r.err == nil) || tt.atDialText != "" && !strings.Contains(s.err.Error(), tt.atDialText) {
			t.Errorf("dialler: %v, acceptor: %v", s.err, r.err)
		}
	}
	s, r, _ := pipe(t, keyed, testDoor("", testKey(2), gossipPort)) // which only a frame shows
	go func() { var hdr header; r.receive(&hdr) }()
	s.send(&header{Kind: msgTCPProbe})
	if s.receive(&header{}); !errors.Is(s.err, errOtherKey) {
		t.Errorf("another key: %v", s.err)
	}
}

func TestStreamIsNeverReorderedCutOrSpliced(t *testing.T) {
	d := testDoor("", testKey(1), gossipPort)
	record := func() (hellos string, frames [][]byte) {
		var b bytes.Buffer
		hellos = fmt.Sprint(time.Now())
		s := testSession(d, hellos, nil, &b, true)
		for i := range 3 {
			b.Reset()
			s.send(&header{Kind: msgTable, Seq: uint32(i)})
			frames = append(frames, bytes.Clone(b.Bytes()))
		}
		return hellos, frames
	}
	hellos, f := record()
	_, g := record()
	for _, tt := range []struct {
		fact   string
		frames [][]byte
		taken  int
	}{
		{"as they were sent", f, 3},
		{"one dropped", [][]byte{f[0], f[2]}, 1},
		{"two in another order", [][]byte{f[1], f[0], f[2]}, 0},
		{"one twice", [][]byte{f[0], f[0]}, 1},
		{"one of another stream", [][]byte{f[0], g[1]}, 1},
	} {
		s := testSession(d, hellos, bytes.NewReader(slices.Concat(tt.frames...)), io.Discard, false)
		taken := 0
		for s.err == nil {
			if s.receive(&header{}); s.err == nil {
				taken++
			}
		}
		if taken != tt.taken {
			t.Errorf("%s: %d frames are taken, want %d", tt.fact, taken, tt.taken)
		}
	}
	back := testSession(d, hellos, bytes.NewReader(f[0]), io.Discard, true)
	if back.receive(&header{}); back.err == nil {
		t.Error("a frame is taken by the side that sent it")
	}
}

// The keys are written out here as RFC 5869, section 2.3, has it: one HMAC, since one is long enough.
func TestFrameIsAnAESGCMWhoseNonceIsItsCount(t *testing.T) {
	key := testKey(1)[0]
	var b bytes.Buffer
	s := testSession(&sealer{cluster: "c", keys: [][]byte{key}}, "HELLOS", nil, &b, true)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("c\x00stream trueHELLOS\x01"))
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	for count := range byte(3) {
		b.Reset()
		s.sendBytes([]byte("hello"))
		data, err := gcm.Open(nil, []byte{11: count}, b.Bytes()[4:], nil)
		if err != nil || string(data) != "hello" {
			t.Errorf("frame %d: %q, %v", count, data, err)
		}
	}
}

// Each side makes half of what the keys are derived from, at random: whatever the other side says again, a nonce never
// comes twice under a key.
func TestStreamHasKeysThatNoOtherHas(t *testing.T) {
	d := testDoor("", testKey(1), gossipPort)
	seen := make(map[string]bool)
	for range 1000 {
		hello := string(d.hello())
		for _, hellos := range []string{hello + "same", "same" + hello} {
			for _, ofDialler := range []bool{true, false} {
				st := d.newStream(ofDialler, hellos)
				seen[string(st.aeads[0].Seal(nil, make([]byte, 12), nil, nil))] = true
			}
		}
	}
	if len(seen) != 4000 {
		t.Errorf("4,000 streams have %d keys", len(seen))
	}
}

// testSession is a session whose hellos are over.
func testSession(d *sealer, hellos string, r io.Reader, w io.Writer, dialled bool) *session {
	return &session{conn: writeOnly{Reader: r, w: w}, dialled: dialled, out: d.newStream(dialled, hellos), in: d.newStream(!dialled, hellos)}
}

// writeOnly is a connection made of a reader and a writer.
type writeOnly struct {
	net.Conn
	io.Reader
	w io.Writer
}

func (c writeOnly) Read(b []byte) (int, error)       { return c.Reader.Read(b) }
func (c writeOnly) Write(b []byte) (int, error)      { return c.w.Write(b) }
func (c writeOnly) SetWriteDeadline(time.Time) error { return nil }

func TestStreamGivesUpAPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := testDoor("", nil, gossipPort)
		s, _, _ := pipe(t, d, d)
		began := time.Now()
		if s.send(&header{}); !timedOut(s.err) || time.Since(began) != frameTimeout {
			t.Errorf("after %v: %v", time.Since(began), s.err)
		}
	})
}

func FuzzFrames(f *testing.F) {
	d := testDoor("", nil, gossipPort)
	var b bytes.Buffer
	s := testSession(d, "", nil, &b, true)
	s.send(&header{Kind: msgSync, From: "a"})
	s.send(&header{Kind: msgTable}, update{Member: labMember(1)})
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3})
	f.Fuzz(func(t *testing.T, in []byte) {
		s := testSession(d, "", bytes.NewReader(in), io.Discard, false)
		for i := 0; s.err == nil; i++ {
			if s.receive(&header{}); i > len(in) {
				t.Fatal("more frames than bytes")
			}
		}
	})
}

func FuzzHello(f *testing.F) {
	keyed := testDoor("c", testKey(1), gossipPort)
	f.Add(keyed.hello(), true)
	f.Add(testDoor("c", nil, rpcPort).hello(), false)
	f.Add([]byte("GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, in []byte, dialled bool) {
		var out bytes.Buffer
		s := keyed.handshake(&session{conn: writeOnly{Reader: bytes.NewReader(in), w: &out}, dialled: dialled})
		if out.Len() > helloSize {
			t.Fatalf("%d bytes are said", out.Len())
		}
		if s.err == nil && keyed.checkHello(in[:helloSize], dialled) != nil {
			t.Fatal("a bad hello is taken")
		}
		if s.receive(&header{}); s.err == nil {
			t.Fatal("a frame is taken from a peer without the key")
		}
	})
}

// ---- agents among themselves ----

func TestJoinTellsBothSidesOfAllOthers(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	blue, _ := startTestGossip(t, "blue", gossipConfig{nodeConfig: nodeConfig{seeds: []string{address(red).String()}}})
	green, _ := startTestGossip(t, "green", gossipConfig{})
	if n, err := joined(green, address(blue).String()); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for _, g := range []*gossip{red, blue, green} {
		eventually(t, "all three are alive for each", func() bool { return len(seen(g)) == 3 })
	}
	blue.close()
	for _, g := range []*gossip{red, green} {
		eventually(t, "blue has failed", func() bool { return seen(g)["blue"] == statusFailed })
	}
	if green.leave(); red.err != nil {
		t.Error(red.err)
	}
	eventually(t, "green has left", func() bool { return seen(red)["green"] == statusLeft })
}

func TestJoinThatFailsSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	plain, plainLog := startTestGossip(t, "plain", gossipConfig{})
	keyed, keyedLog := startTestGossip(t, "keyed", gossipConfig{sealer: sealer{keys: testKey(1)}})
	other, _ := startTestGossip(t, "other", gossipConfig{sealer: sealer{keys: testKey(2)}})
	apart, _ := startTestGossip(t, "apart", gossipConfig{sealer: sealer{cluster: "elsewhere"}})
	rpc := startTestRPC(t, plain, "")
	web := &http.Server{Handler: http.NotFoundHandler()}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go web.Serve(ln)
	defer web.Close()
	said := make(map[string]bool)
	cases := []struct {
		joiner       *gossip
		addr, remedy string
	}{
		{other, address(keyed).String(), "has another key: give both the same -encrypt"},
		{plain, address(keyed).String(), "start this one with -encrypt"},
		{keyed, address(plain).String(), "start that one with -encrypt"},
		{apart, address(plain).String(), "give both the same -cluster"},
		{plain, fakeServer(t, "HAMLET/9\r\n\r\n"+strings.Repeat("x", helloSize)), "speaks protocol 9, this agent 5: upgrade this one"},
		{plain, fakeServer(t, "HAMLET/3\r\n\r\n"+strings.Repeat("x", helloSize)), "speaks protocol 4 or older, this agent 5: upgrade that one"},
		{plain, ln.Addr().String(), "is this the right port"},
		{plain, fakeServer(t, ""), "as a Serf agent does"},
		{plain, rpc, fmt.Sprintf("is the RPC port of a hamlet agent, which gossips on port %d", address(plain).Port())},
		{plain, address(plain).String(), "that is this node itself"},
		{plain, "127.0.0.1:1", "connection refused"},
		{plain, "10.99.99.99:7946", "-bind sets another address"},
		{plain, "[::1]:7946", "an address of another kind"},
	}
	for _, c := range cases {
		for range 2 {
			start := time.Now()
			n, err := joined(c.joiner, c.addr)
			if n > 0 || err == nil || time.Since(start) > 2*time.Second || !strings.HasPrefix(err.Error(), c.addr+": ") || !strings.Contains(err.Error(), c.remedy) {
				t.Errorf("join %s, want %q, after %v: %v", c.addr, c.remedy, time.Since(start), err)
			}
			if err != nil {
				said[strings.ReplaceAll(err.Error(), c.addr, "")] = true
			}
		}
	}
	if len(said) != len(cases) {
		t.Errorf("%d reasons, but %d different errors: %q", len(cases), len(said), slices.Sorted(maps.Keys(said)))
	}
	for _, l := range []*logged{plainLog, keyedLog} {
		if n := strings.Count(l.String(), "[WARN]") - strings.Count(l.String(), "it came to the RPC, and looks for the other port"); n != 1 {
			t.Errorf("one peer that came often is %d lines:\n%s", n, l)
		}
	}
}

// fakeServer answers every connection with the same bytes, and hangs up.
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
			c.Close()
		}
	}()
	return ln.Addr().String()
}

// lookAt has g probe addr by TCP, and returns what it saw.
func lookAt(t *testing.T, g *gossip, name string, addr netip.AddrPort, born uint64) (saw []verdict) {
	t.Helper()
	m := Member{Name: name, Addr: addr, Instance: born, Incarnation: born, Status: statusAlive}
	g.run(func(n *node) error {
		p := n.detector.addProbe(n, m)
		p.e, p.start = &entry{claim: &claim{Member: m}}, n.now+time.Hour
		return nil
	})
	done := make(chan struct{})
	go func() { g.tcpProbe(m, 0); close(done) }()
	for over := false; !over; {
		select {
		case <-done:
			over = true
		case <-time.After(ms):
		}
		g.run(func(n *node) error {
			if len(n.detector.probes) > 0 {
				if v := n.detector.probes[0].result; len(saw) == 0 && v > 0 || len(saw) > 0 && saw[len(saw)-1] != v {
					saw = append(saw, v)
				}
			}
			return nil
		})
	}
	g.run(func(n *node) error { n.detector.probes = nil; return nil })
	return saw
}

func TestProbeByTCPTellsWhatIsAtTheAddress(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	other, _ := startTestGossip(t, "blue", gossipConfig{})
	self, _ := other.self()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	at := func(ln net.Listener) netip.AddrPort { return netip.MustParseAddrPort(ln.Addr().String()) }
	for _, tt := range []struct {
		fact string
		name string
		addr netip.AddrPort
		born uint64
		last verdict
	}{
		{"the member itself", "blue", self.Addr, self.Instance, verdictAlive},
		{"another run of it", "blue", self.Addr, self.Instance - 1, verdictRefused},
		{"another member", "green", self.Addr, self.Instance, verdictRefused},
		{"nobody", "green", netip.MustParseAddrPort("127.0.0.1:1"), 5, verdictRefused},
		{"a kernel whose process is silent", "green", at(silent), 5, verdictSilent},
		{"one who accepts and hangs up", "green", netip.MustParseAddrPort(fakeServer(t, "")), 5, verdictNone},
	} {
		saw := lookAt(t, g, tt.name, tt.addr, tt.born)
		if last := append([]verdict{verdictNone}, saw...)[len(saw)]; last != tt.last {
			t.Errorf("%s: it saw %v, want %v at the end", tt.fact, saw, tt.last)
		}
	}
}

// relay stands between two agents and can be told what to do to the bytes.
func relay(t *testing.T, to string, through func(dst, src net.Conn, dialled bool)) string {
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
			s, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				continue
			}
			go through(s, c, true)
			go through(c, s, false)
		}
	}()
	return ln.Addr().String()
}

// full makes g know of count more members that have left: a table of many frames.
func full(g *gossip, prefix string, count int) {
	g.run(func(n *node) error {
		for i := range count {
			m := Member{Name: fmt.Sprintf("%s%05d", prefix, i), Addr: netip.MustParseAddrPort("127.0.0.1:9"), Incarnation: 5, Instance: 5, Status: statusLeft, Tags: Tags("k=" + strings.Repeat("v", 300))}
			n.table.apply(n.now, m, 0)
		}
		return nil
	})
}

func TestSyncThatIsCutAnywhereIsMadeAnew(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	full(red, "r", 300)
	for _, cut := range []int{0, 10, helloSize, helloSize + 3, 200, 5000, 40_000, 90_000} {
		for _, way := range []bool{true, false} {
			blue, _ := startTestGossip(t, "blue", gossipConfig{})
			full(blue, "b", 300)
			addr := relay(t, address(red).String(), func(dst, src net.Conn, dialled bool) {
				if dialled == way {
					io.CopyN(dst, src, int64(cut))
				} else {
					io.Copy(dst, src)
				}
				dst.Close()
				src.Close()
			})
			start := time.Now()
			if n, err := joined(blue, addr); n > 0 || err == nil || time.Since(start) > sessionTimeout+frameTimeout {
				t.Errorf("cut after %d bytes: %d, %v after %v", cut, n, err, time.Since(start))
			}
			if n, err := joined(blue, address(red).String()); n != 1 {
				t.Errorf("after a cut at %d: %v", cut, err)
			}
			if n := len(seen(blue)); n != 602 {
				t.Errorf("after a cut at %d: %d members", cut, n)
			}
			blue.leave()
			eventually(t, "blue has left", func() bool { return seen(red)["blue"] != statusAlive })
		}
	}
}

func TestSyncWithAPeerThatStopsIsGivenUp(t *testing.T) {
	t.Parallel()
	red, _ := startTestGossip(t, "red", gossipConfig{})
	full(red, "r", 600)
	blue, _ := startTestGossip(t, "blue", gossipConfig{})
	addr := relay(t, address(red).String(), func(dst, src net.Conn, dialled bool) {
		io.CopyN(dst, src, 20_000) // then half-open: nothing comes, and nobody is told
	})
	start := time.Now()
	if n, err := joined(blue, addr); n > 0 || err == nil || time.Since(start) > sessionTimeout+frameTimeout+time.Second {
		t.Errorf("%d, %v after %v", n, err, time.Since(start))
	}
	if len(red.turns) > 0 {
		t.Error("it has a turn while it waits for its peer")
	}
}

func TestSyncWithASlowPeerIsWaitedForAndHoldsNoPlaceForEver(t *testing.T) {
	t.Parallel()
	red, _ := startTestGossip(t, "red", gossipConfig{})
	full(red, "r", 100)
	blue, _ := startTestGossip(t, "blue", gossipConfig{})
	addr := relay(t, address(red).String(), func(dst, src net.Conn, dialled bool) {
		for {
			if _, err := io.CopyN(dst, src, 4<<10); err != nil {
				dst.Close()
				return
			}
			time.Sleep(50 * ms)
		}
	})
	if n, err := joined(blue, addr); n != 1 {
		t.Error(err)
	}
}

// Sixteen connections that said 119 bytes a second held every place for comparing tables.
func TestSyncThatIsDraggedOutKeepsNobodyOut(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	for range 100 {
		_, s := greeting(t, red)
		s.send(&header{Kind: msgSync, From: "x", Digest: 1})
		if s.receive(&header{}); s.err != nil {
			t.Fatal(s.err)
		}
		s.send(&header{Kind: msgTable, More: true, Target: "a"}, update{Member: labMember(3)})
	}
	start := time.Now()
	blue, _ := startTestGossip(t, "blue", gossipConfig{})
	if n, err := joined(blue, address(red).String()); n != 1 || time.Since(start) > time.Second {
		t.Errorf("joined %d after %v: %v", n, time.Since(start), err)
	}
}

func TestSyncEndsThatBringsNothing(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	_, s := greeting(t, red)
	s.send(&header{Kind: msgSync, From: "x", Digest: 1})
	s.receive(&header{})
	s.send(&header{Kind: msgTable, More: true, Target: "a"})
	start := time.Now()
	if s.receive(&header{}); s.err == nil || timedOut(s.err) || time.Since(start) > time.Second {
		t.Errorf("after %v: %v", time.Since(start), s.err)
	}
}

func TestSessionEndsAsAWholeHoweverItsFramesTrickle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := testDoor("", nil, gossipPort)
		s, r, _ := pipe(t, d, d)
		go func() {
			for s.err == nil {
				s.send(&header{Kind: msgTable})
				time.Sleep(frameTimeout - ms)
			}
		}()
		began := time.Now()
		defer r.endAfter(syncTimeout).Stop()
		for r.err == nil {
			r.conn.SetReadDeadline(time.Now().Add(frameTimeout))
			r.receive(&header{})
		}
		if time.Since(began) != syncTimeout {
			t.Errorf("it ended after %v: %v", time.Since(began), r.err)
		}
		r.conn.Close()
		time.Sleep(2 * frameTimeout) // until the other side has noticed
	})
}

func TestLinkTellsOfTheEndOfAProcessAtOnceAndAByeDoesNot(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	blue, _ := startTestGossip(t, "blue", gossipConfig{})
	if n, err := joined(blue, address(red).String()); n != 1 {
		t.Fatal(err)
	}
	eventually(t, "links stand", func() bool {
		n := 0
		red.run(func(*node) error { n = len(red.state.links); return nil })
		return n == 1
	})
	time.Sleep(50 * ms)
	probes := func() (n int) { red.run(func(m *node) error { n = len(m.detector.probes); return nil }); return n }
	blue.run(func(n *node) error { blue.relink(n.self.Member, nil); return nil })
	time.Sleep(linkOverlap + 20*ms)
	if probes() > 0 {
		t.Error("a bye starts a probe")
	}
	start := time.Now()
	blue.close()
	eventually(t, "blue has failed", func() bool { return seen(red)["blue"] == statusFailed })
	t.Logf("failed %v after the end", time.Since(start).Round(ms))
}

// A process that ends must not say that it has only hung up: its watchers would wait
// for its next heartbeat.
func TestLinkThatEndsWithItsProcessSaysNoBye(t *testing.T) {
	for _, ends := range []bool{false, true} {
		blue, _ := startTestGossip(t, "blue", gossipConfig{})
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		up, bye := make(chan bool), make(chan bool)
		go func() {
			c, _ := ln.Accept()
			s := blue.acceptor.sealer.Load().handshake(&session{conn: c})
			s.receive(&header{})
			s.send(&header{Kind: msgHandshakeReply, From: "green", Incarnation: 7})
			close(up)
			var hdr header
			s.receive(&hdr)
			bye <- s.err == nil && hdr.Kind == msgBye
		}()
		ctx, cancel := context.WithCancel(blue.acceptor.ctx)
		go blue.linkOnce(ctx, Member{Name: "green", Addr: netip.MustParseAddrPort(ln.Addr().String()), Instance: 7}, 0)
		if <-up; ends {
			blue.close()
		} else {
			cancel()
		}
		if got := <-bye; got == ends {
			t.Errorf("the process ends: %v; a bye is said: %v", ends, got)
		}
		cancel()
	}
}

func TestAcceptorTakesPeersWhileConnectionsAreHeldOpen(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	limit := red.acceptor.places.limit
	var held []net.Conn
	for range limit + 50 {
		c, err := net.Dial("tcp", address(red).String())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	blue, _ := startTestGossip(t, "blue", gossipConfig{})
	if n, err := joined(blue, address(red).String()); n != 1 {
		t.Error(err)
	}
	closed := 0
	for _, c := range held {
		c.SetReadDeadline(time.Now().Add(ms)) // before its time to say hello is over
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			closed++
		}
	}
	if closed < 50 {
		t.Errorf("%d connections were opened, the limit is %d, %d are closed", len(held), limit, closed)
	}
}

// crowd takes places for count connections from each of the addresses.
func (ps *places) crowd(t *testing.T, proven bool, count int, addrs ...string) (ss []*session) {
	for range count {
		for _, a := range addrs {
			c, _ := net.Pipe()
			t.Cleanup(func() { c.Close() })
			s := &session{conn: c}
			s.proven.Store(proven)
			ps.take(s, netip.MustParseAddr(a))
			ss = append(ss, s)
		}
	}
	return ss
}

func (ps *places) holds(s *session) bool {
	return slices.Contains(ps.taken, s)
}

// 3,000 silent connections a second kept out every joiner whose round trip was 200 ms: the oldest made room.
func TestAcceptorTakesPlacesFromTheAddressThatHasMost(t *testing.T) {
	many := func(format string) (addrs []string) {
		for i := range 250 {
			addrs = append(addrs, fmt.Sprintf(format, i+1))
		}
		return addrs
	}
	for what, tt := range map[string]struct {
		proven bool     // the attacker's
		addrs  []string // of the attacker
	}{
		"one address":              {false, []string{"10.9.9.9"}},
		"eight addresses":          {false, many("10.9.9.%d")[:8]},
		"an IPv6 host":             {false, many("2001:db8::%x")},
		"one address, no key":      {true, []string{"10.9.9.9"}},
		"eight addresses, no key":  {true, many("10.9.9.%d")[:8]},
		"an IPv6 host, and no key": {true, many("2001:db8::%x")},
		"a member's, also mapped":  {false, []string{"10.9.9.9", "10.0.0.7"}},
		"a member's, and no key":   {true, []string{"10.9.9.9", "10.0.0.7"}},
	} {
		ps := &places{limit: 100}
		links := ps.crowd(t, true, 2, "10.0.0.1", "10.0.0.2", "10.0.0.3")
		ps.crowd(t, tt.proven, 200, tt.addrs...)
		joiners := ps.crowd(t, false, 1, "10.0.1.1", "10.0.1.2", "2001:db9::1")
		ps.crowd(t, tt.proven, 1000, tt.addrs...)
		for _, s := range append(links, joiners...) {
			if !ps.holds(s) {
				t.Errorf("%s: a member or a joiner has lost its place", what)
			}
		}
		if len(ps.taken) != ps.limit {
			t.Errorf("%s: %d places are taken", what, len(ps.taken))
		}
	}
}

func TestAcceptorKeepsPlacesOfMembersFromStrangersEverywhere(t *testing.T) {
	ps := &places{limit: 100}
	links := ps.crowd(t, true, 70, "10.0.0.1")
	for i := range 10000 {
		ps.crowd(t, false, 1, fmt.Sprintf("10.%d.%d.1", 1+i>>8, i&255))
	}
	for _, s := range links {
		if !ps.holds(s) {
			t.Fatal("a member has lost its place to peers that have proven nothing")
		}
	}
}

// Where there is no key, any stranger can hold proven places; then a newcomer is the only peer that has proven nothing.
func TestAcceptorLeavesPlacesForNewcomersWhenAllOthersAreProven(t *testing.T) {
	ps := &places{limit: 100}
	ps.crowd(t, true, 300, "10.9.9.9")
	joiners := ps.crowd(t, false, 1, "10.0.1.1", "10.0.1.2", "10.0.1.3", "10.0.1.4")
	for _, s := range joiners {
		if !ps.holds(s) {
			t.Error("a newcomer made room for another one")
		}
	}
}

func TestAcceptorOfBothPortsHasOneBudget(t *testing.T) {
	red, _ := startTestGossip(t, "red", gossipConfig{})
	red.acceptor.places.limit = 20
	rpc := startTestRPC(t, red, "")
	for range 30 {
		for _, addr := range []string{rpc, address(red).String()} {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
	}
	// The other port may still be accepting what was dialled before, and each of that takes a place from somebody.
	eventually(t, "an answer", func() bool {
		_, _, err := call(rpc, "", rpcRequest{Op: "members"})
		return err == nil
	})
	red.acceptor.places.mu.Lock()
	defer red.acceptor.places.mu.Unlock()
	if len(red.acceptor.places.taken) > 20 {
		t.Errorf("%d places are taken, of 20", len(red.acceptor.places.taken))
	}
}

// ---- commands ----

func startTestRPC(t testing.TB, g *gossip, token string) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(serveRPC(ln, g, token, func() []string { return manyFacts }).close)
	return ln.Addr().String()
}

// manyFacts take several frames.
var manyFacts = slices.Repeat([]string{"group", "key", strings.Repeat("v", 900)}, 100)

func call(addr, token string, req rpcRequest) (last rpcResponse, us []update, err error) {
	err = (&client{addr: addr, token: token}).call(req, rpcTimeout, func(a rpcResponse, more []update) error {
		last, us = a, append(us, more...)
		return nil
	})
	return last, us, err
}

func TestRPCRequestsReachTheNodeAndAnswersComeBack(t *testing.T) {
	var mu sync.Mutex
	var events []string
	g, _ := startTestGossip(t, "red", gossipConfig{events: func(ev Event, answer func(reply, []byte)) {
		mu.Lock()
		defer mu.Unlock()
		if ev.kind >= eventUser {
			events = append(events, fmt.Sprintf("%v %s %q %v", ev.kind, ev.Name, ev.Payload, ev.Coalesce))
		}
		if ev.kind == eventQuery {
			go answer(replyDone, []byte("0.5"))
		}
	}})
	addr := startTestRPC(t, g, "")
	full(g, "m", 3*pageSize)
	if _, us, err := call(addr, "", rpcRequest{Op: "members"}); err != nil || len(us) != 3*pageSize+1 || us[0].Member.Status != statusLeft {
		t.Errorf("members: %d, %v", len(us), err)
	}
	other, _ := startTestGossip(t, "blue", gossipConfig{})
	if a, _, err := call(addr, "", rpcRequest{Op: "join", Args: address(other).String() + "\x00127.0.0.1:1"}); err != nil || a.Count != 1 {
		t.Errorf("a join that one of two missed: %+v, %v", a, err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "join", Args: "127.0.0.1:1"}); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1: connection refused") {
		t.Errorf("a join that nobody answered: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "force-leave", Name: "blue"}); err == nil || !strings.Contains(err.Error(), "is alive") {
		t.Errorf("force-leave: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "event", Name: "e", Payload: []byte("\x00\xff"), Coalesce: true}); err != nil {
		t.Errorf("event: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "tags", Args: "k=v"}); err != nil {
		t.Errorf("tags: %v", err)
	}
	eventually(t, "the tags are everywhere", func() (ok bool) {
		other.run(func(n *node) error { e := n.table.get("red"); ok = e != nil && e.Tags == "k=v"; return nil })
		return ok
	})
	if _, us, err := call(addr, "", rpcRequest{Op: "query", Name: "load", Timeout: 5 * time.Second}); err != nil || !slices.ContainsFunc(us, func(u update) bool { return u.Member.Name == "red" && string(u.Payload) == "0.5" }) {
		t.Errorf("query: %+v, %v", us, err)
	}
	var facts []string
	err := (&client{addr: addr}).call(rpcRequest{Op: "info"}, rpcTimeout, func(a rpcResponse, _ []update) error {
		facts = append(facts, splitNUL(a.Text)...)
		return nil
	})
	if err != nil || !slices.Equal(facts, manyFacts) {
		t.Errorf("info: %d facts, %v", len(facts), err)
	}
	if err := (&client{addr: addr}).call(rpcRequest{Op: "info"}, rpcTimeout, func(rpcResponse, []update) error { return io.ErrShortWrite }); err != io.ErrShortWrite {
		t.Errorf("an answer that cannot be shown: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "dance"}); err == nil || !strings.Contains(err.Error(), `"dance"`) {
		t.Errorf("unknown request: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "leave"}); err != nil {
		t.Errorf("leave: %v", err)
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "members"}); err == nil {
		t.Error("after a leave the port still answers")
	}
	mu.Lock()
	defer mu.Unlock()
	if want := []string{`user e "\x00\xff" true`, `query load "" false`}; !slices.Equal(events, want) {
		t.Errorf("events %q", events)
	}
}

func TestRPCTokenIsAskedForAndNeverTravels(t *testing.T) {
	g, l := startTestGossip(t, "red", gossipConfig{})
	var mu sync.Mutex
	var wire bytes.Buffer
	addr := relay(t, startTestRPC(t, g, "sesame"), func(dst, src net.Conn, _ bool) {
		buf := make([]byte, 1<<10)
		for {
			n, err := src.Read(buf)
			mu.Lock()
			wire.Write(buf[:n])
			mu.Unlock()
			dst.Write(buf[:n])
			if err != nil {
				dst.Close()
				return
			}
		}
	})
	for _, token := range []string{"", "sesam", "sesame2", "SESAME"} {
		_, _, err := call(addr, token, rpcRequest{Op: "leave"})
		f, ok := errors.AsType[*failure](err)
		if !ok || f.retriable || f.code != 1 || !strings.Contains(f.msg, "token") || !strings.Contains(f.hint, "SERF_RPC_AUTH") || strings.Contains(f.msg+f.hint, "sesam") {
			t.Errorf("token %q: %+v", token, err)
		}
	}
	if seen(g)["red"] != statusAlive {
		t.Error("done without the token")
	}
	if _, _, err := call(addr, "sesame", rpcRequest{Op: "members"}); err != nil {
		t.Errorf("with the token: %v", err)
	}
	if _, _, err := call(startTestRPC(t, g, ""), "sesame", rpcRequest{Op: "members"}); err == nil || !strings.Contains(err.Error(), "has no token") {
		t.Errorf("a token for an agent without: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if strings.Contains(wire.String(), "sesame") {
		t.Error("the token is on the wire")
	}
	if s := l.String(); strings.Count(s, "[WARN]") > 2 || strings.Contains(s, "sesam") {
		t.Errorf("refusals: %q", s)
	}
}

// A recorded leave made the agent leave once more.
func TestRPCRequestThatWasRecordedIsNotAnswered(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "sesame")
	var mu sync.Mutex
	var said bytes.Buffer
	through := relay(t, addr, func(dst, src net.Conn, dialled bool) {
		if dialled {
			src = &tapped{Conn: src, mu: &mu, to: &said}
		}
		io.Copy(dst, src)
		dst.Close()
	})
	if _, _, err := call(through, "sesame", rpcRequest{Op: "event", Name: "reboot"}); err != nil {
		t.Fatal(err)
	}
	lamport := func() (l uint64) {
		g.run(func(n *node) error { l = n.broadcasts.events.lamport; return nil })
		return l
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mu.Lock()
	c.Write(said.Bytes())
	mu.Unlock()
	c.SetDeadline(time.Now().Add(4 * time.Second))
	got, _ := io.ReadAll(c)
	if len(got) > helloSize+4 || lamport() != 1 {
		t.Errorf("answered with %d bytes, %d events", len(got), lamport())
	}
}

type tapped struct {
	net.Conn
	mu *sync.Mutex
	to io.Writer
}

func (c *tapped) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.to.Write(b[:n])
	return n, err
}

func TestRPCPortIgnoresOtherProtocols(t *testing.T) {
	g, l := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	for name, in := range map[string]string{
		"nothing": "", "HTTP": "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n", "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"hello only": helloLine, "random": strings.Repeat("\x9c\x01\xff", 3000), "a huge frame": string((&sealer{portKind: rpcPort}).hello()) + "\x7f\xff\xff\xff",
	} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, in)
		c.(*net.TCPConn).CloseWrite()
		c.SetDeadline(time.Now().Add(6 * time.Second))
		got, err := io.ReadAll(c)
		if timedOut(err) {
			t.Errorf("%s: the connection stays open", name)
		}
		if len(got) > helloSize {
			t.Errorf("%s: answered %q", name, got)
		}
		c.Close()
	}
	if n := strings.Count(l.String(), "[WARN]"); n != 1 {
		t.Errorf("%d log lines, want one a minute:\n%s", n, l)
	}
	for answer, want := range map[string]string{
		"HAMLET/9\r\n\r\n" + strings.Repeat("x", helloSize):          "speaks protocol 9, this agent 5: upgrade this one",
		"HTTP/1.1 400 Bad Request\r\n\r\n" + strings.Repeat("x", 50): "is not the RPC of a hamlet agent",
		"hi": "is not the RPC of a hamlet agent",
		"":   "is not the RPC of a hamlet agent",
	} {
		at := fakeServer(t, answer)
		if _, _, err := call(at, "", rpcRequest{Op: "members"}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), at) {
			t.Errorf("answer %q: %v; want %q", answer, err, want)
		}
	}
	if _, _, err := call(address(g).String(), "", rpcRequest{Op: "members"}); err == nil || !strings.Contains(err.Error(), "is the gossip port of a hamlet agent") {
		t.Errorf("the gossip port: %v", err)
	}
}

func TestRPCClientThatIsStuckDelaysNobody(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	silent := fakeSilence(t)
	go call(addr, "", rpcRequest{Op: "join", Args: silent})
	start := time.Now()
	for range maxInbound {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if _, _, err := call(addr, "", rpcRequest{Op: "members"}); err != nil || time.Since(start) > 5*time.Second {
		t.Errorf("members took %v: %v", time.Since(start), err)
	}
}

// fakeSilence accepts and says nothing.
func fakeSilence(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

// Clients that never read made an agent with 16,000 members take 1.4 GB.
func TestRPCClientsThatNeverReadCostLittle(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	full(g, "m", maxMembers-10)
	before := heapInUse()
	d := rpcSealer("", 0)
	clients := 250
	if underRace() {
		clients = 20 // each has the agent make up a megabyte or more
	}
	for range clients {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(8 * time.Second))
		d.handshake(&session{conn: c, dialled: true}).send(&rpcRequest{Op: "members"})
	}
	time.Sleep(500 * ms)
	if grown := heapInUse() - before; grown > 64<<20 {
		t.Errorf("%d MB", grown>>20)
	} else {
		t.Logf("%d clients that do not read cost %d MB", clients, grown>>20)
	}
	eventually(t, "another one gets its answer", func() bool {
		_, us, _ := call(addr, "", rpcRequest{Op: "members"})
		return len(us) == maxMembers-9
	})
}

func TestRPCRequestThatIsTooLargeIsNotSent(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	_, _, err := call(startTestRPC(t, g, ""), "", rpcRequest{Op: "event", Name: "e", Payload: make([]byte, maxFrame)})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxFrame)) {
		t.Errorf("%v", err)
	}
}

// More than 3,100 members with names of 10 bytes could not be asked: all names were one frame.
func TestQueryAsksAsManyMembersAsAClusterMayHave(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	g.run(func(n *node) error {
		for i := range maxMembers - 1 {
			m := Member{Name: fmt.Sprintf("%0128d", i), Addr: rigAddr(1), Incarnation: 5, Instance: 5, Status: statusAlive}
			n.table.apply(n.now, m, 0)
		}
		return nil
	})
	names := []string{"red"}
	for i := range maxMembers - 1 {
		names = append(names, fmt.Sprintf("%0128d", i))
	}
	for what, args := range map[string][]string{"all": nil, "all by name": names} {
		asked := make(map[string]bool)
		start := time.Now()
		err := (&client{addr: addr}).call(rpcRequest{Op: "query", Name: "x", Args: strings.Join(args, "\x00"), Timeout: 200 * ms}, 20*time.Second, func(a rpcResponse, _ []update) error {
			for _, name := range splitNUL(a.Text) {
				asked[name] = true
			}
			return nil
		})
		if err != nil || len(asked) != maxMembers || !asked[names[0]] || !asked[names[maxMembers-1]] {
			t.Errorf("%s: %d are asked: %v", what, len(asked), err)
		}
		t.Logf("%s: %v", what, time.Since(start).Round(ms))
	}
}

func TestQueryWaitsForAnHourAtMost(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	for _, d := range []time.Duration{-1, 0, maxQueryTimeout + 1, 1193*time.Hour + 2*time.Minute + 47*time.Second + 297*ms, 1<<63 - 1} {
		if _, _, err := call(addr, "", rpcRequest{Op: "query", Name: "x", Timeout: d}); err == nil || !strings.Contains(err.Error(), "at most 1h") {
			t.Errorf("-timeout %v: %v", d, err)
		}
	}
}

// rogueRPC listens as an agent's RPC does, and answers each request with what makeResponse returns until it has enough.
func rogueRPC(t *testing.T, respond func(s *session)) (addr string) {
	t.Helper()
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
			go func() {
				defer c.Close()
				s := rpcSealer("", 0).handshake(&session{conn: c})
				s.receive(&rpcRequest{})
				respond(s)
			}()
		}
	}()
	return ln.Addr().String()
}

// stdoutOf returns what f prints.
func stdoutOf(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.Create(t.TempDir() + "/stdout")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stdout := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = stdout }()
	f()
	return readFile(file.Name())
}

// A status or a kind out of range made members, watch and query panic.
func TestCommandsShowAnyResponseOfAnAgent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	texts := []string{"", "\x00", "\x00\x00\x00\x00", "a", "a\x00b", "a\x00b\x00c\x00d", "\x1b[31mred\u202e\x9b\xff\r\n", strings.Repeat("x", 9000)}
	numbers := []uint64{0, 1, 2, 3, 6, 7, 8, 200, 255, 1<<31 - 1, 1 << 31, 1<<63 - 1, 1 << 63, 1<<64 - 1}
	text := func() string { return texts[rng.IntN(len(texts))] }
	number := func() uint64 { return numbers[rng.IntN(len(numbers))] }
	var one sync.Mutex // rng is for one at a time
	respond := func(s *session) {
		one.Lock()
		defer one.Unlock()
		for range 20 {
			a := rpcResponse{More: true, Count: int(number()), Text: text(), Kind: eventKind(number()), Reply: reply(number()), At: int64(number()), Dropped: int(number())}
			if rng.IntN(50) == 0 {
				a.Error = text()
			}
			var us []update
			for range rng.IntN(4) {
				m := Member{Name: text(), Status: Status(number()), Tags: Tags(text()), Version: text(), Protocol: uint8(number())}
				us = append(us, update{Member: m, Age: number(), Name: text(), Payload: []byte(text()), LTime: number()})
			}
			s.send(&a, us...)
		}
		s.send(&rpcResponse{})
	}
	addr := rogueRPC(t, respond)
	for _, command := range []string{"members", "members -detailed", "members -format json -detailed", "members -wait 1 -timeout 1ms", "watch", "watch -format json",
		"watch -event user -n 3", "query x", "query -format json x", "query -node a x", "query -tag k=v x", "info", "info -format json", "join x", "leave",
		"event x", "tags -set a=b", "force-leave x"} {
		words := strings.Fields(command)
		for range 50 {
			var err error
			out := stdoutOf(t, func() {
				err = execute(words[0], append([]string{"-rpc-addr", addr}, words[1:]...))
			})
			if strings.ContainsFunc(out, obeyable) {
				t.Fatalf("%s prints %q", command, out)
			}
			if err != nil && strings.ContainsFunc(printable(err.Error(), "\n\t"), obeyable) {
				t.Fatalf("%s ends with %q", command, err)
			}
		}
	}
}

func TestCommandsEndWhenAnAgentNeverDoes(t *testing.T) {
	addr := rogueRPC(t, func(s *session) {
		for s.err == nil {
			s.send(&rpcResponse{More: true, Text: "a\x00b\x00c"}, update{Member: labMember(1)})
		}
	})
	for _, op := range []string{"members", "info", "join", "event", "query"} {
		_, _, err := call(addr, "", rpcRequest{Op: op, Timeout: time.Minute})
		if err == nil || !strings.Contains(err.Error(), "more than a cluster can have") {
			t.Errorf("%s: %v", op, err)
		}
	}

	silent := rogueRPC(t, func(s *session) {
		s.send(&rpcResponse{More: true, Text: "a"})
		time.Sleep(time.Minute)
	})
	start := time.Now()
	err := (&client{addr: silent}).call(rpcRequest{Op: "query", Timeout: 10 * ms}, 100*ms, func(rpcResponse, []update) error { return nil })
	if err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("a query whose agent has stopped ends after %v: %v", time.Since(start), err)
	}
}

func TestFrameHoldsTextsThatBelongTogether(t *testing.T) {
	for last := range 3 * textPage / 100 { // an empty text alone in the last frame would be none
		facts := slices.Repeat([]string{"group", "", strings.Repeat("v", 100)}, last)
		facts = append(facts, "", "", "")
		var b bytes.Buffer
		d := testDoor("", nil, rpcPort)
		testSession(d, "", nil, &b, false).sendTexts(facts, 3)
		var got []string
		for s := testSession(d, "", &b, io.Discard, true); b.Len() > 0; {
			var a rpcResponse
			s.receive(&a)
			part := splitNUL(a.Text)
			if s.err != nil || len(part)%3 != 0 {
				t.Fatalf("a frame of %d texts, %v", len(part), s.err)
			}
			got = append(got, part...)
		}
		if !slices.Equal(got, facts) {
			t.Fatalf("%d facts become %d", len(facts), len(got))
		}
	}
}

func TestCodecAllocatesLittleForHostileMessages(t *testing.T) {
	inputs := [][]byte{
		{4, 0xfd, 0x0f, 0x42, 0x40, 'x'},
		{1, 0xf8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		bytes.Repeat([]byte{1, 0xfc, 0x3f, 0xff, 0xff, 0xff}, 1000),
		bytes.Repeat([]byte{0xff}, maxFrame),
		{200, 1, 2, 3},
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, in := range inputs {
		for _, m := range []any{&header{}, &update{}, &rpcRequest{}, &rpcResponse{}} {
			if _, err := wire.decode(in, m); err == nil {
				t.Errorf("% x is a %T", in[:4], m)
			}
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

func FuzzRPCRequest(f *testing.F) {
	f.Add(wire.encode(nil, &rpcRequest{Op: "join", Args: "a\x00b", Timeout: time.Second}))
	f.Add(wire.encode(nil, &rpcRequest{Op: "event", Name: "n", Payload: []byte("p"), Prune: true, Coalesce: true}))
	f.Add([]byte{4, 0xfd, 0x0f, 0x42, 0x40, 'x'})
	f.Fuzz(func(t *testing.T, in []byte) {
		var req, again rpcRequest
		rest, err := wire.decode(in, &req)
		if err != nil {
			return
		}
		if n := len(req.Op) + len(req.Args) + len(req.DeleteTags) + len(req.Name) + len(req.Payload) + len(rest); n > len(in) {
			t.Fatalf("%d bytes out of %d", n, len(in))
		}
		if _, err := wire.decode(wire.encode(nil, &req), &again); err != nil || !reflect.DeepEqual(req, again) && len(req.Payload) > 0 {
			t.Fatalf("%+v becomes %+v, %v", req, again, err)
		}
	})
}

// ---- streams ----

// reads returns the numbers of the events that sub has before it, and how many it is told are lost.
func (sub *subscriber) reads() (numbers []uint64, lost int) {
	for len(sub.waiting) > 0 {
		d := <-sub.waiting
		numbers = append(numbers, d.ev.LTime)
		lost += int(sub.dropped.Swap(0))
	}
	return numbers, lost
}

func TestFeedTellsASlowReaderWhatItHasLost(t *testing.T) {
	var f feed
	slow, quick, asker := f.subscribe(0), f.subscribe(0), f.subscribe(3)
	count, got := 6*queueLimit, 0
	for i := range count {
		f.publish(Event{kind: eventUser, update: update{LTime: uint64(i), Payload: make([]byte, maxPayload)}})
		f.publish(Event{kind: eventAnswer, id: 4}) // no event, and for nobody
		numbers, lost := quick.reads()
		got += len(numbers)
		if lost > 0 {
			t.Fatalf("a quick reader has lost %d at %d", lost, i)
		}
	}
	numbers, lost := slow.reads()
	if got != count || len(numbers)+lost != count || lost < count/2 || numbers[0] != uint64(lost) || numbers[len(numbers)-1] != uint64(count-1) {
		t.Errorf("%d events: the quick reader has %d, the slow one %d and has lost %d", count, got, len(numbers), lost)
	}

	f.publish(Event{kind: eventUser, update: update{LTime: 1}})
	f.publish(Event{kind: eventAnswer, id: 3, update: update{LTime: 2}})
	if numbers, lost := slow.reads(); !slices.Equal(numbers, []uint64{1}) || lost > 0 {
		t.Errorf("later it reads %d and has lost %d", numbers, lost)
	}
	if numbers, lost := asker.reads(); !slices.Equal(numbers, []uint64{2}) || lost > 0 {
		t.Errorf("an asker reads %d and has lost %d", numbers, lost)
	}

	f.publish(Event{kind: eventUser, update: update{LTime: 3}})
	f.unsubscribe(slow)
	f.publish(Event{kind: eventUser, update: update{LTime: 4}})
	if numbers, _ := slow.reads(); !slices.Equal(numbers, []uint64{3}) {
		t.Errorf("after its end it reads %d", numbers)
	}
	if _, more := <-slow.waiting; more {
		t.Error("its end has no end")
	}
}

// 250 watchers that never read cost 150 MB: each had a queue of its own.
func TestFeedTakesTheSameForAnyNumberOfReaders(t *testing.T) {
	var f feed
	before := heapInUse()
	var subs []*subscriber
	for range 250 {
		subs = append(subs, f.subscribe(0))
	}
	for range 100_000 {
		f.publish(Event{kind: eventUser, update: update{Name: "e", Payload: make([]byte, 1000)}})
	}
	if grown := heapInUse() - before; grown > 16<<20 {
		t.Errorf("%d MB", grown>>20)
	}
	for _, sub := range subs {
		f.unsubscribe(sub)
		f.unsubscribe(sub) // its reader may go while the agent ends
	}
	f.publish(Event{kind: eventUser})
	clear(subs)
	if grown := heapInUse() - before; len(f.subscribers) > 0 || grown > 1<<20 {
		t.Errorf("nobody reads, and %d kB wait for %d subscribers", grown>>10, len(f.subscribers))
	}
}

func TestWatchersSeeAllThatHappensAndLeaveNothingBehind(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	addr := startTestRPC(t, g, "")
	feeds := func() int { g.feed.mu.Lock(); defer g.feed.mu.Unlock(); return len(g.feed.subscribers) }
	const watchers, events = 20, 100
	var all sync.WaitGroup
	for range watchers {
		all.Go(func() {
			got, there := 0, 0
			err := (&client{addr: addr}).call(rpcRequest{Op: "watch"}, rpcTimeout, func(a rpcResponse, us []update) error {
				for _, u := range us {
					if a.Kind == 0 && u.Member.Name == "red" {
						there++
					}
					if a.Kind == eventUser && u.Name == fmt.Sprint("e", got) {
						got++
					}
				}
				if got == events {
					return io.EOF
				}
				return nil
			})
			if err != nil || there != 1 || got != events {
				t.Errorf("%d events, %d times red, %v", got, there, err)
			}
		})
	}
	d := rpcSealer("", 0)
	for range 5 { // these never read, and vanish
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		d.handshake(&session{conn: c, dialled: true}).send(&rpcRequest{Op: "watch"})
		defer c.Close()
	}
	eventually(t, "all watch", func() bool { return feeds() == watchers+5 })
	for i := range events {
		g.run(func(n *node) error { return n.userEvent(fmt.Sprint("e", i), []byte("x"), false) })
	}
	all.Wait()
	eventually(t, "those that have gone are forgotten", func() bool { return feeds() == 5 })
}
