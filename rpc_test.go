package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeCluster notes what the RPC server asks of it.
type fakeCluster struct {
	mu     sync.Mutex
	called []string
	block  chan struct{} // Join waits for it
}

func (f *fakeCluster) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.called = append(f.called, fmt.Sprintf(format, args...))
}

func (f *fakeCluster) calls() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.called, "; ")
}

func (f *fakeCluster) Members() []Member {
	f.note("members")
	return []Member{{Name: "a", Addr: netip.MustParseAddrPort("[2001:db8::1]:7946"), Incarnation: 7, Born: 6, Status: StatusFailed, Tags: "k=v"}}
}

func (f *fakeCluster) Join(addrs []string) (int, error) {
	f.note("join %q", addrs)
	if f.block != nil {
		<-f.block
	}
	if len(addrs) == 1 {
		return 0, fmt.Errorf("%s: nobody there", addrs[0])
	}
	return len(addrs) - 1, errors.New("one did not answer")
}

func (f *fakeCluster) Leave() error { f.note("leave"); return nil }

func (f *fakeCluster) ForceLeave(name string, prune bool) error {
	f.note("force-leave %s %v", name, prune)
	return fmt.Errorf("%s is alive", name)
}

func (f *fakeCluster) UserEvent(name string, payload []byte, coalesce bool) error {
	f.note("event %s %q %v", name, payload, coalesce)
	return nil
}

// startRPC serves c on a free port.
func startRPC(t *testing.T, c cluster, token string) (s *rpcServer, addr string, logged *processOutput) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	logged = &processOutput{}
	s = serveRPC(ln, c, token, log.New(logged, "", 0))
	t.Cleanup(s.Close)
	return s, ln.Addr().String(), logged
}

// rpcBytes is a request as it travels.
func rpcBytes(token string, value []byte) []byte {
	sum := sha256.Sum256([]byte(token))
	b := append([]byte(rpcMagic), sum[:]...)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(value))), value...)
}

func TestRequestsReachTheClusterAndAnswersComeBack(t *testing.T) {
	f := &fakeCluster{}
	_, addr, _ := startRPC(t, f, "")
	call := func(r request) (answer, error) { return callRPC(addr, "", r, rpcTimeout) }

	ans, err := call(request{Op: "members"})
	if diff := cmp.Diff(f.Members(), ans.Members, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	if ans, err := call(request{Op: "join", Addrs: "x y z:1"}); err != nil || ans.Joined != 2 {
		t.Errorf("a join that one of three missed: %+v, %v", ans, err)
	}
	if _, err := call(request{Op: "join", Addrs: "x"}); err == nil || err.Error() != "x: nobody there" {
		t.Errorf("a join that nobody answered: %v", err)
	}
	if _, err := call(request{Op: "force-leave", Name: "web", Prune: true}); err == nil || err.Error() != "web is alive" {
		t.Errorf("force-leave: %v", err)
	}
	if _, err := call(request{Op: "event", Name: "e", Payload: []byte("\x00\xff"), Coalesce: true}); err != nil {
		t.Errorf("event: %v", err)
	}
	if _, err := call(request{Op: "dance"}); err == nil || !strings.Contains(err.Error(), `"dance"`) {
		t.Errorf("unknown request: %v", err)
	}
	if _, err := call(request{}); err == nil {
		t.Error("an empty request was answered")
	}
	if _, err := call(request{Op: "leave"}); err != nil {
		t.Errorf("leave: %v", err)
	}
	if _, err := call(request{Op: "members"}); err == nil {
		t.Error("after a leave the port still answers")
	}
	want := `members; members; join ["x" "y" "z:1"]; join ["x"]; force-leave web true; event e "\x00\xff" true; leave`
	if got := f.calls(); got != want {
		t.Errorf("calls:\n%s\nwant:\n%s", got, want)
	}
}

func TestTheTokenIsAskedFor(t *testing.T) {
	f := &fakeCluster{}
	_, addr, logged := startRPC(t, f, "sesame")
	for _, token := range []string{"", "sesam", "sesame2", "SESAME"} {
		_, err := callRPC(addr, token, request{Op: "leave"}, rpcTimeout)
		f := &failure{}
		if !errors.As(err, &f) || f.again || f.code != 1 || !strings.Contains(f.msg, "token") || !strings.Contains(f.hint, "SERF_RPC_AUTH") || strings.Contains(f.msg+f.hint, "sesam") {
			t.Errorf("token %q: %+v", token, err)
		}
	}
	if f.calls() != "" {
		t.Errorf("done without the token: %s", f.calls())
	}
	if _, err := callRPC(addr, "sesame", request{Op: "members"}, rpcTimeout); err != nil {
		t.Errorf("with the token: %v", err)
	}
	if s := logged.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "token") || strings.Contains(s, "sesam") {
		t.Errorf("four refusals in one minute are one line, without the token: %q", s)
	}
}

func TestOtherProtocolsOnThePortCauseNothing(t *testing.T) {
	f := &fakeCluster{}
	_, addr, logged := startRPC(t, f, "")
	leave := packRequest(request{Op: "leave"})
	var stream bytes.Buffer
	gob.NewEncoder(&stream).Encode(request{Op: "leave"})
	bigger := rpcBytes("", leave)
	binary.BigEndian.PutUint32(bigger[len(rpcMagic)+sha256.Size:], 1<<31)
	for name, in := range map[string][]byte{
		"nothing":            {},
		"HTTP":               append([]byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"), rpcBytes("", leave)...),
		"TLS":                {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0, 0, 0},
		"gossip":             []byte(preamble),
		"a gob stream":       rpcBytes("", stream.Bytes()),
		"magic only":         []byte(rpcMagic),
		"cut short":          rpcBytes("", leave)[:len(rpcBytes("", leave))-1],
		"a huge length":      bigger,
		"a million elements": rpcBytes("", []byte{4, 0xfd, 0x0f, 0x42, 0x40, 'x'}),
		"random":             bytes.Repeat([]byte{0x9c, 0x01, 0xff}, 3000),
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(in)
		conn.(*net.TCPConn).CloseWrite()
		conn.SetDeadline(time.Now().Add(4 * time.Second))
		got, err := io.ReadAll(conn)
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			t.Errorf("%s: the connection stays open", name)
		}
		if len(got) > 0 {
			t.Errorf("%s: answered %q", name, got)
		}
		conn.Close()
	}
	if f.calls() != "" {
		t.Errorf("strangers made the agent do: %s", f.calls())
	}
	if n := strings.Count(logged.String(), "\n"); n != 1 {
		t.Errorf("%d log lines, want one a minute:\n%s", n, logged)
	}
	if _, err := callRPC(addr, "", request{Op: "members"}, rpcTimeout); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestAnotherVersionIsToldFromNoHamletAtAll(t *testing.T) {
	serve := func(answer string) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				conn.Read(make([]byte, 1000))
				io.WriteString(conn, answer)
				conn.Close()
			}
		}()
		return ln.Addr().String()
	}
	for answer, want := range map[string]string{
		"hamlet-rpc/2\n":                   "another version",
		"HTTP/1.1 400 Bad Request\r\n\r\n": "is not the RPC of a hamlet agent",
		"hi":                               "is not the RPC of a hamlet agent",
		"":                                 "is not the RPC of a hamlet agent",
		rpcMagic:                           "no agent answers",
		rpcMagic + "\x05abcdefg":           "no agent answers",
	} {
		addr := serve(answer)
		_, err := callRPC(addr, "", request{Op: "members"}, rpcTimeout)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), addr) {
			t.Errorf("answer %q: %v; want %q", answer, err, want)
		}
	}
	_, addr, _ := startRPC(t, &fakeCluster{}, "")
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "hamlet-rpc/9\nwhatever a later version may send")
	conn.SetDeadline(time.Now().Add(4 * time.Second))
	if got := make([]byte, len(rpcMagic)); true {
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != rpcMagic {
			t.Errorf("a client of another version is told %q, %v", got, err)
		}
	}
}

func TestAStuckClientDelaysNobody(t *testing.T) {
	f := &fakeCluster{block: make(chan struct{})}
	defer close(f.block)
	_, addr, _ := startRPC(t, f, "")
	go callRPC(addr, "", request{Op: "join", Addrs: "x"}, time.Minute)
	eventually(t, "a join that hangs", func() bool { return f.calls() != "" })
	idle, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	start := time.Now()
	if _, err := callRPC(addr, "", request{Op: "members"}, rpcTimeout); err != nil || time.Since(start) > time.Second {
		t.Errorf("members took %v: %v", time.Since(start), err)
	}
}

func TestIdleConnectionsAreBounded(t *testing.T) {
	s, addr, _ := startRPC(t, &fakeCluster{}, "")
	var idle []net.Conn
	for range 3 * maxRPCConns {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	start := time.Now()
	if _, err := callRPC(addr, "", request{Op: "members"}, rpcTimeout); err != nil || time.Since(start) > time.Second {
		t.Errorf("members among %d idle connections took %v: %v", len(idle), time.Since(start), err)
	}
	s.guests.mu.Lock()
	n := len(s.guests.here)
	s.guests.mu.Unlock()
	if n > maxRPCConns {
		t.Errorf("%d connections are held", n)
	}
	idle[0].SetReadDeadline(time.Now().Add(4 * time.Second))
	if _, err := idle[0].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the oldest connection is still open: %v", err)
	}
}

func TestTooLargeARequestIsNotSent(t *testing.T) {
	_, addr, _ := startRPC(t, &fakeCluster{}, "")
	_, err := callRPC(addr, "", request{Op: "join", Addrs: strings.Repeat("x", maxRequest)}, rpcTimeout)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxRequest)) {
		t.Errorf("%v", err)
	}
}

func TestHostileRequestsAllocateLittle(t *testing.T) {
	inputs := [][]byte{
		{4, 0xfd, 0x0f, 0x42, 0x40, 'x'},
		{1, 0xf8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		bytes.Repeat([]byte{1, 0xfc, 0x3f, 0xff, 0xff, 0xff}, 1000),
		bytes.Repeat([]byte{0xff}, maxRequest),
		{200, 1, 2, 3},
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, in := range inputs {
		if _, err := unpackRequest(in); err == nil {
			t.Errorf("% x is a request", in[:4])
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

func FuzzRPCRequest(f *testing.F) {
	f.Add(rpcBytes("t", packRequest(request{Op: "join", Addrs: "a b"})))
	f.Add(rpcBytes("", packRequest(request{Op: "event", Name: "n", Payload: []byte("p"), Prune: true, Coalesce: true})))
	f.Add(rpcBytes("", nil))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("hamlet-rpc/2\n"))
	f.Add(rpcBytes("", []byte{4, 0xfd, 0x0f, 0x42, 0x40, 'x'}))
	f.Fuzz(func(t *testing.T, in []byte) {
		req, token, err := readRequest(bytes.NewReader(in))
		if err != nil {
			return
		}
		if len(token) != sha256.Size || !bytes.HasPrefix(in, []byte(rpcMagic)) {
			t.Fatalf("accepted without a head: %q", in)
		}
		if n := len(req.Op) + len(req.Addrs) + len(req.Name) + len(req.Payload); n > len(in) {
			t.Fatalf("%d bytes out of %d", n, len(in))
		}
		again, err := unpackRequest(packRequest(req))
		if err != nil || cmp.Diff(req, again) != "" {
			t.Fatalf("%+v becomes %+v, %v", req, again, err)
		}
	})
}
