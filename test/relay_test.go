package test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relay stands in front of an agent, which advertises its address, or of an
// RPC. It records all that comes through, and can play the agent when that is
// dead.
type relay struct {
	addr, target string // addr may begin as 127.0.0.1:0
	rec          *recording
	change       *change // made in each stream
	ghost        bool    // nobody is there: answer with what was recorded
	asked        atomic.Int64
	tcp          net.Listener
	udp          *net.UDPConn
}

// change makes one byte of what the dialler says, or is answered, one higher.
type change struct {
	answer bool
	at     int
}

// recording is what was on the wire.
type recording struct {
	mu        sync.Mutex
	datagrams [][]byte
	streams   []*stream
}

// stream is what the dialler said and what it was answered. The hello is what
// it said until then.
type stream struct{ said, answered, hello []byte }

func (r *recording) datagram(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.datagrams = append(r.datagrams, bytes.Clone(b))
}

func (r *recording) stream() *stream {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &stream{}
	r.streams = append(r.streams, s)
	return s
}

func (r *recording) note(s *stream, answer bool, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if answer {
		s.answered = append(s.answered, p...)
	} else if s.said = append(s.said, p...); len(s.answered) == 0 {
		s.hello = s.said
	}
}

// all returns the datagrams and the streams in which something was said.
func (r *recording) all() (datagrams [][]byte, streams []stream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.streams {
		if len(s.said) > 0 {
			streams = append(streams, stream{bytes.Clone(s.said), bytes.Clone(s.answered), bytes.Clone(s.hello)})
		}
	}
	return slices.Clone(r.datagrams), streams
}

func startRelay(t *testing.T, r *relay) *relay {
	t.Helper()
	addr := r.addr
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
			datagrams, _ := r.rec.all()
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
				_, streams := r.rec.all()
				c.Write(streams[i%len(streams)].answered)
				io.Copy(io.Discard, c)
			} else if to, err := net.Dial("tcp", r.target); err == nil {
				defer to.Close()
				s, done := r.rec.stream(), make(chan struct{}, 2)
				go r.pipe(to, c, s, false, done)
				go r.pipe(c, to, s, true, done)
				<-done
			}
		}()
	}
}

// pipe takes one way of a stream on.
func (r *relay) pipe(dst, src net.Conn, s *stream, answer bool, done chan<- struct{}) {
	defer func() { done <- struct{}{} }()
	passed := 0
	for buf := make([]byte, 32<<10); ; {
		n, err := src.Read(buf)
		if c := r.change; c != nil && c.answer == answer && c.at >= passed && c.at < passed+n {
			buf[c.at-passed]++
		}
		passed += n
		r.rec.note(s, answer, buf[:n])
		if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// startRelayed starts an agent behind a relay, which is what others see.
func startRelayed(t *testing.T, rec *recording, keys []string, name string, args ...string) (*agent, *relay) {
	t.Helper()
	r := startRelay(t, &relay{rec: rec, addr: "127.0.0.1:0", target: freePort(t)})
	return startKeyed(t, keys, append([]string{"-node", name, "-bind", r.target, "-advertise", r.addr}, args...)...), r
}

// replay sends an agent all that was ever recorded, as if it came from others.
func replay(t *testing.T, rec *recording, a *agent) (datagrams, streams int) {
	t.Helper()
	ds, ss := rec.all()
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
	for _, s := range ss {
		c, err := net.Dial("tcp", a.bind)
		if err != nil {
			t.Fatal(err)
		}
		c.Write(s.said)
		c.(*net.TCPConn).CloseWrite()
		c.SetReadDeadline(time.Now().Add(100 * ms))
		io.Copy(io.Discard, c)
		c.Close()
	}
	return len(ds), len(ss)
}

// captured is what a cluster said in its life, so that tests can say the like.
type captured struct {
	datagrams [][]byte
	streams   []stream // between agents
	rpc       []stream // of commands that change nothing
	hello     string   // what a dialling agent says first
	leave     string   // what the leave command says
}

var (
	captures   = make(map[string]*captured) // by key
	capturesMu sync.Mutex
)

// capture returns what red, green and blue said, with a key or without, when
// that was first asked for: they join, send an event, lose one, are asked by
// commands and leave.
func capture(t *testing.T, keys ...string) *captured {
	t.Helper()
	capturesMu.Lock()
	defer capturesMu.Unlock()
	id := strings.Join(keys, ",")
	if captures[id] == nil {
		captures[id] = recordLife(t, keys, "red", "green", "blue")
	}
	return captures[id]
}

func recordLife(t *testing.T, keys []string, names ...string) *captured {
	t.Helper()
	wire, commands := &recording{}, &recording{}
	seed, at := startRelayed(t, wire, keys, names[0])
	all := []*agent{seed}
	for _, name := range names[1:] {
		a, _ := startRelayed(t, wire, keys, name, "-join", at.addr)
		all = append(all, a)
	}
	waitAlive(t, names, all...)
	front := startRelay(t, &relay{rec: commands, addr: "127.0.0.1:0", target: seed.rpc})
	ask := func(command string, args ...string) { runCmd(t, askCmd(front.addr, command, args...)) }
	seed.run("event", "deploy", "3f2c1aa")
	last := all[len(all)-1]
	last.waitLine(eventLine("deploy"))
	last.kill()
	seed.waitStatus(last.name, "failed")
	ask("members")
	ask("force-leave", "nobody")
	c := &captured{}
	_, c.rpc = commands.all()
	ask("leave")
	for _, a := range all[1 : len(all)-1] {
		a.int()
	}
	for _, a := range all {
		a.wait()
	}
	c.datagrams, c.streams = wire.all()
	c.hello = string(c.streams[0].hello)
	_, streams := commands.all()
	c.leave = string(streams[len(streams)-1].said)
	if c.hello == "" || c.leave == "" || len(c.datagrams) < 10 || len(c.rpc) != 2 {
		t.Fatalf("too little was captured: %d datagrams, %d streams, %d commands, a hello of %d bytes", len(c.datagrams), len(c.streams), len(streams), len(c.hello))
	}
	return c
}
