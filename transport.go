// transport.go: how bytes travel.
//
// Here live the codec (primed gob), the seal (AES-GCM), the UDP and TCP
// sockets, and the one goroutine that owns the node and never blocks. It takes
// no protocol decision: what arrives goes to the node, what the node puts out
// goes to the sockets.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const (
	protocolVersion = 1
	defaultPort     = "7946"
	preamble        = "HAMLET/1\r\n\r\n" // opens a dialled stream; an HTTP server answers it at once
	maxInbound      = 512                // accepted streams at a time
	helloFor        = 2 * time.Second    // for a stranger's first frame
	bodyFor         = 5 * time.Second    // for the rest of a frame once it has begun
	resolveFor      = 1500 * time.Millisecond
	inboxSize       = 1024
	drainFor        = 20 * time.Millisecond
)

// codec encodes and decodes messages with one gob encoder and one decoder that
// have seen the type definitions, so that what travels is bare values in any
// order and with any loss. Not safe for concurrent use.
type codec struct {
	buf bytes.Buffer
	enc *gob.Encoder
	in  bytes.Reader
	dec *gob.Decoder
}

// wireTypes pins the gob type ids of what travels, which depend on the order in
// which the process touches types: whoever else uses gob comes later.
var wireTypes = primeTypes()

type primed struct {
	definitions           []byte
	head, update, request []byte // the type ids as they stand in a message
}

func primeTypes() primed {
	var p primed
	var buf bytes.Buffer
	enc := gob.NewEncoder(&buf)
	id := func(v any) []byte {
		if err := enc.Encode(v); err != nil {
			panic(err)
		}
		p.definitions = append(p.definitions, buf.Bytes()...)
		buf.Reset()
		if err := enc.Encode(v); err != nil {
			panic(err)
		}
		_, n, _ := gobUint(buf.Bytes()) // length, then id
		_, k, _ := gobUint(buf.Bytes()[n:])
		defer buf.Reset()
		return bytes.Clone(buf.Bytes()[n : n+k])
	}
	p.head, p.update, p.request = id(&head{}), id(&update{}), id(&request{})
	return p
}

func newCodec() *codec {
	c := &codec{}
	c.enc = gob.NewEncoder(&c.buf)
	c.in.Reset(wireTypes.definitions)
	c.dec = gob.NewDecoder(&c.in)
	for _, v := range []any{&head{}, &update{}, &request{}} {
		c.enc.Encode(v)
		c.dec.Decode(v)
	}
	return c
}

// head appends the encoding of h to dst.
func (c *codec) head(dst []byte, h *head) []byte { return c.encode(dst, h) }

// update appends the encoding of u to dst.
func (c *codec) update(dst []byte, u *update) []byte { return c.encode(dst, u) }

func (c *codec) encode(dst []byte, v any) []byte {
	c.buf.Reset()
	if err := c.enc.Encode(v); err != nil {
		panic(err) // flat structs always encode
	}
	return append(dst, c.buf.Bytes()...)
}

// readHead decodes the message that opens b and returns what follows it.
func (c *codec) readHead(b []byte) (h head, rest []byte, err error) {
	rest, err = c.decode(b, wireTypes.head, &h)
	return h, rest, err
}

// readUpdate decodes the update that opens b and returns what follows it.
func (c *codec) readUpdate(b []byte) (u update, rest []byte, err error) {
	rest, err = c.decode(b, wireTypes.update, &u)
	return u, rest, err
}

// decode hands gob only what it can do no harm with: a message of a type that
// it knows, of a length that is there. New definitions, which could grow the
// decoder without bound, do not get in.
func (c *codec) decode(b, id []byte, v any) (rest []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("undecodable message: %v", r)
		}
	}()
	size, n, err := gobUint(b)
	if err != nil || size > uint64(len(b)-n) || !bytes.HasPrefix(b[n:], id) {
		return nil, errors.New("malformed message")
	}
	end := n + int(size)
	c.in.Reset(b[:end])
	if err := c.dec.Decode(v); err != nil {
		return nil, err
	}
	if c.in.Len() > 0 {
		return nil, errors.New("malformed message")
	}
	return b[end:], nil
}

// gobUint reads gob's unsigned integer: a byte below 128, or the negated count
// of the big-endian bytes that follow.
func gobUint(b []byte) (v uint64, n int, err error) {
	if len(b) == 0 {
		return 0, 0, errors.New("empty message")
	}
	if b[0] < 128 {
		return uint64(b[0]), 1, nil
	}
	n = int(-int8(b[0]))
	if n > 8 || n < 0 || len(b) < 1+n {
		return 0, 0, errors.New("malformed message")
	}
	for _, x := range b[1 : 1+n] {
		v = v<<8 | uint64(x)
	}
	return v, 1 + n, nil
}

// ---- the seal ----

// seal closes and opens what travels. With keys everything is authenticated
// before anything is decoded; the cluster's name and the receiver are bound to
// it, so that what was said to one member cannot be played to another. Safe for
// concurrent use.
type seal struct {
	cluster string
	tag     [4]byte // of the cluster's name, in clear
	keys    []cipher.AEAD
}

// What the fourth byte of a frame's header says: how its body travels or, from
// an acceptor that can make nothing of a first frame, why.
const (
	codePlain byte = iota
	codeSealed
	denyVersion
	denyCluster
	denyKeyless
	denyKeyed
	denyKey
)

var denials = map[byte]error{
	denyVersion: errors.New("speaks another version of the protocol: run the same hamlet on both sides"),
	denyCluster: errors.New("belongs to another cluster: give both the same -cluster"),
	denyKeyless: errors.New("wants a key, and this agent has none: start this one with -encrypt too"),
	denyKeyed:   errors.New("has no key, and this agent has one: start that one with -encrypt too"),
	denyKey:     errors.New("has another key: give both the same -encrypt"),
}

func newSeal(cluster string, keys [][]byte) (*seal, error) {
	s := &seal{cluster: cluster}
	h := fnv.New32a()
	io.WriteString(h, cluster)
	h.Sum(s.tag[:0])
	for _, k := range keys {
		block, err := aes.NewCipher(k)
		if err != nil {
			return nil, fmt.Errorf("bad key of %d bytes: %w", len(k), err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return nil, err
		}
		s.keys = append(s.keys, aead)
	}
	return s, nil
}

func (s *seal) code() byte {
	if len(s.keys) > 0 {
		return codeSealed
	}
	return codePlain
}

// close appends data to dst for context, which names the way and the receiver.
func (s *seal) close(dst, data []byte, context string) []byte {
	dst = append(dst, s.tag[:]...)
	if len(s.keys) == 0 {
		return append(dst, data...)
	}
	return s.keys[0].Seal(dst, nil, data, []byte(context+"\x00"+s.cluster))
}

// open undoes close for a body of the given code. The error is one of denials.
func (s *seal) open(code byte, b []byte, context string) ([]byte, error) {
	switch {
	case len(b) < len(s.tag) || !bytes.Equal(b[:len(s.tag)], s.tag[:]):
		return nil, denials[denyCluster]
	case code == codePlain && len(s.keys) > 0:
		return nil, denials[denyKeyed]
	case code == codeSealed && len(s.keys) == 0:
		return nil, denials[denyKeyless]
	case code == codePlain:
		return b[len(s.tag):], nil
	}
	for _, k := range s.keys {
		if out, err := k.Open(nil, nil, b[len(s.tag):], []byte(context+"\x00"+s.cluster)); err == nil {
			return out, nil
		}
	}
	return nil, denials[denyKey]
}

// A datagram is a version byte, whose high bit says that it is sealed, and a
// closed body.
func (s *seal) closeDatagram(data []byte, to string) []byte {
	b := make([]byte, 1, 64+len(data))
	b[0] = protocolVersion | s.code()<<7
	return s.close(b, data, "datagram "+to)
}

func (s *seal) openDatagram(b []byte, self string) ([]byte, error) {
	if len(b) == 0 || b[0]&0x7f != protocolVersion {
		return nil, denials[denyVersion]
	}
	return s.open(b[0]>>7, b[1:], "datagram "+self)
}

// way is part of a frame's context: it tells what the dialler sent from what
// the acceptor sent.
func way(fromDialler bool) string {
	if fromDialler {
		return "there"
	}
	return "back"
}

// A frame is "hm", the version, a code, the body's length, and a closed body.
const frameHeader = 8

func (s *seal) closeFrame(data []byte, fromDialler bool) []byte {
	b := append(make([]byte, 0, frameHeader+64+len(data)), 'h', 'm', protocolVersion, s.code(), 0, 0, 0, 0)
	b = s.close(b, data, way(fromDialler))
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-frameHeader))
	return b
}

// readFrame reads and opens one frame. wait is called between the header and
// the body, to set a deadline.
func (s *seal) readFrame(r io.Reader, fromDialler bool, wait func()) ([]byte, error) {
	var h [frameHeader]byte
	if n, err := io.ReadFull(r, h[:]); err != nil {
		if n > 2 && string(h[:2]) != "hm" {
			return nil, notHamlet(h[:n])
		}
		return nil, err
	}
	size := binary.BigEndian.Uint32(h[4:])
	switch {
	case string(h[:2]) != "hm":
		return nil, notHamlet(h[:])
	case denials[h[3]] != nil:
		return nil, denials[h[3]]
	case h[2] != protocolVersion || h[3] > codeSealed:
		return nil, denials[denyVersion]
	case size > maxFrame+1024:
		return nil, fmt.Errorf("sent a frame of %d bytes, the limit is %d", size, maxFrame)
	}
	wait()
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return s.open(h[3], b, way(fromDialler))
}

func notHamlet(b []byte) error {
	return fmt.Errorf("is no hamlet agent (it says %.8q): is this the right port?", b)
}

// denial is the header that tells a dialler why its first frame was refused,
// seen from its side; nil where there is nothing to say.
func denial(err error) []byte {
	for code, e := range denials {
		if errors.Is(err, e) {
			switch code {
			case denyKeyless:
				code = denyKeyed
			case denyKeyed:
				code = denyKeyless
			}
			return []byte{'h', 'm', protocolVersion, code, 0, 0, 0, 0}
		}
	}
	return nil
}

// ---- the loop ----

// GossipConfig is what StartGossip needs to know.
type GossipConfig struct {
	Name      string
	Bind      netip.AddrPort // UDP and TCP; port 0 takes a free one
	Advertise netip.AddrPort // what others are told; its port 0 means the bound one
	Moves     bool           // Advertise was not chosen by the user: it may change
	Tags      Tags
	Seeds     []string // HOST or HOST:PORT, resolved anew at each try
	RetryMax  int      // failed rounds of joining the seeds; 0: for ever
	ReapAfter time.Duration
	Keys      [][]byte // AES keys: the first seals, any opens
	Cluster   string
	Log       *log.Logger
	Events    func(Event) // called from the loop: must not block
}

// Gossip runs a node: it owns its sockets and the loop. Its methods are safe
// for concurrent use.
type Gossip struct {
	cfg   GossipConfig
	seal  *seal
	udp   *net.UDPConn
	tcp   net.Listener
	start time.Time
	inbox chan datagram    // too many are lost
	calls chan func(*node) // all else that the loop shall do; the callers wait
	done  chan struct{}
	quit  context.CancelFunc
	ctx   context.Context
	wg    sync.WaitGroup
	node  *node // of the loop alone
	err   error // valid after done

	conns   map[connID]*conn // of the loop alone
	inbound connID           // the last that was accepted
	joins   map[int]chan joined
	tokens  int
	guests  guests
	strange strangers
}

// datagram is one that arrived, opened.
type datagram struct {
	from netip.AddrPort
	data []byte
}

// StartGossip binds the sockets, starts the loop, and begins to join the seeds.
func StartGossip(cfg GossipConfig) (*Gossip, error) {
	s, err := newSeal(cfg.Cluster, cfg.Keys)
	if err != nil {
		return nil, err
	}
	g := &Gossip{cfg: cfg, seal: s, start: time.Now(), done: make(chan struct{}),
		inbox: make(chan datagram, inboxSize), calls: make(chan func(*node)),
		conns: make(map[connID]*conn), joins: make(map[int]chan joined)}
	g.strange.log, g.guests.limit = cfg.Log, inboundLimit()
	if err := g.listen(); err != nil {
		return nil, err
	}
	bound := g.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	addr := cfg.Advertise
	if !addr.IsValid() {
		addr = netip.AddrPortFrom(bound.Addr().Unmap(), bound.Port())
	}
	if addr.Port() == 0 {
		addr = netip.AddrPortFrom(addr.Addr(), bound.Port())
	}
	born := uint64(time.Now().UnixMilli())
	nc := nodeConfig{Self: Member{Name: cfg.Name, Addr: addr, Incarnation: born, Born: born, Tags: cfg.Tags},
		Seeds: cfg.Seeds, RetryMax: cfg.RetryMax, ReapAfter: cfg.ReapAfter, Codec: newCodec()}
	rand.Read(nc.Random[:])
	g.node = newNode(nc, 0)
	g.ctx, g.quit = context.WithCancel(context.Background())
	g.wg.Go(g.readUDP)
	g.wg.Go(func() { g.guests.accept(g.tcp, &g.strange, g.accepted) })
	go g.run()
	return g, nil
}

// inboundLimit leaves half of the file descriptors for everything else.
func inboundLimit() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return maxInbound
	}
	return int(min(maxInbound, max(uint64(r.Cur)/2, 8)))
}

// listen binds UDP and TCP to one port. A free port may be taken by somebody
// between the two, so port 0 is tried a few times.
func (g *Gossip) listen() error {
	family := ""
	if g.cfg.Bind.Addr().Is4() {
		family = "4"
	}
	var err error
	for range 10 {
		lc := net.ListenConfig{KeepAlive: -1}
		if g.tcp, err = lc.Listen(context.Background(), "tcp"+family, g.cfg.Bind.String()); err != nil {
			return err
		}
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(g.cfg.Bind.Addr(), uint16(g.tcp.Addr().(*net.TCPAddr).Port)))
		if g.udp, err = net.ListenUDP("udp"+family, at); err == nil {
			g.udp.SetReadBuffer(1 << 20)
			return nil
		}
		g.tcp.Close()
		if g.cfg.Bind.Port() != 0 {
			return err
		}
	}
	return err
}

// run is the loop: the only goroutine that touches the node.
func (g *Gossip) run() {
	planned := time.Duration(0)
	for g.ctx.Err() == nil {
		select {
		case d := <-g.inbox:
			g.datagram(d)
		case f := <-g.calls:
			f(g.node)
		case <-time.After(max(planned-g.now(), 0)): // one timer moved on would still wake at its old time
		case <-g.ctx.Done():
		}
		// Whoever was stopped must hear what arrived meanwhile before it
		// judges, so the readers get a moment to hand it over.
		g.drain(g.now()-planned > lateBy)
		g.node.tick(g.now())
		out := g.node.take()
		g.carryOut(out)
		planned = out.wake
	}
	g.stop()
}

func (g *Gossip) now() time.Duration { return time.Since(g.start) }

// drain hands in what has arrived, datagrams first; if late, also what arrives
// within 2 ms. Peers that never stop sending must not keep it from ticking.
func (g *Gossip) drain(late bool) {
	var grace <-chan time.Time
	if late {
		grace = time.After(2 * time.Millisecond)
	}
	for end := g.now() + drainFor; g.now() < end; {
		select {
		case d := <-g.inbox:
			g.datagram(d)
			continue
		default:
		}
		select {
		case f := <-g.calls:
			f(g.node)
			continue
		default:
		}
		if grace == nil {
			return
		}
		select {
		case d := <-g.inbox:
			g.datagram(d)
		case f := <-g.calls:
			f(g.node)
		case <-grace:
			grace = nil
		}
	}
}

func (g *Gossip) datagram(d datagram) {
	if err := g.node.datagram(g.now(), d.from, d.data); err != nil {
		g.strange.seen(d.from.Addr(), err)
	}
}

// dialed takes the end of a dial and, where the node may take another address,
// the one from which it went out.
func (g *Gossip) dialed(c *conn, from netip.Addr, err error) {
	if g.conns[c.id] == nil {
		return // closed while it was dialling
	}
	if err != nil {
		delete(g.conns, c.id)
	}
	if from.IsValid() {
		own := g.node.self.Addr.Addr()
		g.node.moved(g.now(), c.id, from, from != own && !isMine(own), uint64(time.Now().UnixMilli()))
	}
	g.node.dialed(g.now(), c.id, err)
}

func (g *Gossip) frame(c *conn, data []byte) {
	if g.conns[c.id] == nil {
		return
	}
	if err := g.node.frame(g.now(), c.id, data); err != nil {
		g.strange.seen(c.from.Addr(), err)
		g.endConn(c.id, err)
	} else if c.frames++; c.frames == 2 && c.guest != nil {
		c.guest.proven.Store(true)
	}
}

// endConn ends a stream that the network ended, or that sent nonsense.
func (g *Gossip) endConn(id connID, err error) {
	if c := g.conns[id]; c != nil {
		delete(g.conns, id)
		c.abort()
		g.node.closed(g.now(), id, err)
	}
}

// carryOut does what the node wants done.
func (g *Gossip) carryOut(out outputs) {
	for _, l := range out.logs {
		g.cfg.Log.Print(l)
	}
	for _, ev := range out.events {
		if ev.Kind == EventUser {
			g.cfg.Log.Printf("[INFO] user-event: %s", oneLine(ev.Name))
		} else {
			g.cfg.Log.Printf("[INFO] %s: %s %s", ev.Kind, ev.Member.Name, ev.Member.Addr.Addr())
		}
		g.cfg.Events(ev)
	}
	if len(out.packets) > 0 {
		g.writeUDP(out.packets)
	}
	for _, op := range out.streams {
		g.streamOp(op)
	}
	for _, j := range out.joins {
		if ch := g.joins[j.token]; ch != nil {
			delete(g.joins, j.token)
			ch <- j
		}
	}
	if out.resolve {
		go g.resolveSeeds()
	}
	if out.fatal != nil && g.err == nil {
		g.err = out.fatal
	}
	if out.fatal != nil || out.left {
		g.quit()
	}
}

func (g *Gossip) streamOp(op streamOp) {
	c := g.conns[op.id]
	switch {
	case op.op == opDial:
		ctx, cancel := context.WithTimeout(g.ctx, streamFor)
		c := &conn{g: g, id: op.id, from: op.to, cancel: cancel}
		g.conns[op.id] = c
		g.wg.Go(func() { c.dial(ctx) })
	case c == nil:
	case op.op == opSend:
		c.send(g.seal.closeFrame(op.data, op.id > 0))
	case op.op == opClose:
		delete(g.conns, op.id)
		c.finish()
	}
}

func (g *Gossip) stop() {
	g.quit()
	g.udp.Close()
	g.tcp.Close()
	for _, id := range slices.Sorted(maps.Keys(g.conns)) {
		g.conns[id].abort()
	}
	waitAtMost(time.Second, func() { g.wg.Wait(); g.guests.served.Wait() }) // a peer may read too slowly for my last words
	close(g.done)
}

// waitAtMost reports whether wait returned within d.
func waitAtMost(d time.Duration, wait func()) bool {
	done := make(chan struct{})
	go func() { wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// call has the loop run f and waits until it has taken it; false once it has ended.
func (g *Gossip) call(f func(*node)) bool {
	select {
	case g.calls <- f:
		return true
	case <-g.ctx.Done():
		return false
	}
}

// ---- UDP ----

func (g *Gossip) readUDP() {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := g.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue // an ICMP answer to something sent before
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if n > maxDatagram {
			g.strange.seen(from.Addr(), errors.New("sent a datagram that is too long"))
			continue
		}
		data, err := g.seal.openDatagram(buf[:n], g.cfg.Name)
		if err != nil {
			g.strange.seen(from.Addr(), err)
			continue
		}
		select {
		case g.inbox <- datagram{from, bytes.Clone(data)}:
		default:
			g.strange.dropped.Add(1)
		}
	}
}

// writeUDP sends ps at once. What does not fit into the socket's buffer is lost,
// as UDP may: net's own methods would hold up the loop until there is room.
func (g *Gossip) writeUDP(ps []packet) {
	raw, err := g.udp.SyscallConn()
	if err != nil {
		return
	}
	raw.Write(func(fd uintptr) bool {
		for _, p := range ps {
			syscall.Sendto(int(fd), g.seal.closeDatagram(p.data, p.name), 0, g.sockaddr(p.to))
		}
		return true
	})
}

// sockaddr is to as a socket of this family takes it.
func (g *Gossip) sockaddr(to netip.AddrPort) syscall.Sockaddr {
	if g.cfg.Bind.Addr().Is4() {
		if !to.Addr().Is4() {
			return nil
		}
		return &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	sa := &syscall.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if ifc, err := net.InterfaceByName(to.Addr().Zone()); err == nil {
		sa.ZoneId = uint32(ifc.Index)
	}
	return sa
}

// ---- TCP ----

// conn is one stream's socket. The loop sends and ends it, its own goroutine
// reads; a writer runs only while there is something to write.
type conn struct {
	g      *Gossip
	id     connID
	from   netip.AddrPort
	cancel context.CancelFunc // of a dial
	guest  *guest             // of an accepted one
	frames int                // how many made sense; the second answers a challenge

	mu      sync.Mutex
	c       net.Conn
	queue   [][]byte
	queued  int
	writing bool
	closing bool // after the queue
}

// maxQueued bounds what waits for a peer that does not read: a table of
// maxMembers fits.
const maxQueued = 16 << 20

// accepted reads an inbound stream to its end.
func (g *Gossip) accepted(guest *guest) {
	guest.Conn.(*net.TCPConn).SetReadBuffer(64 << 10) // what a stranger may make the kernel hold
	from := guest.RemoteAddr().(*net.TCPAddr).AddrPort()
	c := &conn{g: g, from: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), c: guest, guest: guest}
	if err := g.do(func(*node) {
		g.inbound--
		c.id = g.inbound
		g.conns[c.id] = c
	}); err == nil {
		c.read()
	}
}

// guests bounds the accepted connections. When there are too many, the oldest
// that has proven nothing goes, so that strangers who hold connections open keep
// nobody out. Safe for concurrent use.
type guests struct {
	limit  int
	served sync.WaitGroup
	mu     sync.Mutex
	here   []*guest // oldest first
}

type guest struct {
	net.Conn
	proven atomic.Bool // it has said something that makes sense
}

// accept serves what comes in at ln until it is closed.
func (gs *guests) accept(ln net.Listener, strange *strangers, serve func(*guest)) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			strange.seen(netip.Addr{}, fmt.Errorf("cannot accept a connection at %s: %w", ln.Addr(), err))
			time.Sleep(50 * time.Millisecond) // out of file descriptors: some will come back
			continue
		}
		g := gs.add(c)
		gs.served.Go(func() {
			serve(g)
			gs.remove(g)
		})
	}
}

func (gs *guests) add(c net.Conn) *guest {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	if len(gs.here) >= gs.limit {
		i := max(0, slices.IndexFunc(gs.here, func(o *guest) bool { return !o.proven.Load() }))
		gs.here[i].Close()
		gs.here = slices.Delete(gs.here, i, i+1)
	}
	g := &guest{Conn: c}
	gs.here = append(gs.here, g)
	return g
}

// remove closes g and forgets it.
func (gs *guests) remove(g *guest) {
	g.Close()
	gs.mu.Lock()
	defer gs.mu.Unlock()
	gs.here = slices.DeleteFunc(gs.here, func(o *guest) bool { return o == g })
}

// usable reports whether other machines may reach ip at a socket bound to bind.
func usable(ip, bind netip.Addr) bool {
	return ip.IsGlobalUnicast() && ip.Zone() == "" && fits(ip, bind)
}

// fits reports whether a socket bound to bind takes packets of ip's family.
func fits(ip, bind netip.Addr) bool { return ip.Is4() == bind.Is4() || bind == netip.IPv6Unspecified() }

// isMine reports whether others can reach this machine at ip, as far as it knows.
func isMine(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err != nil || !ip.IsLoopback() && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == ip
	})
}

func (c *conn) dial(ctx context.Context) {
	defer c.cancel()
	d := net.Dialer{KeepAlive: -1}
	if ip := c.g.cfg.Bind.Addr(); !ip.IsUnspecified() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	}
	nc, err := d.DialContext(ctx, "tcp", c.from.String())
	if err != nil {
		if ip := c.g.cfg.Bind.Addr(); !ip.IsUnspecified() && ip.Is4() != c.from.Addr().Is4() {
			err = fmt.Errorf("this agent is bound to %s, an address of another kind", ip)
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			err = errRefused
		}
		c.g.call(func(*node) { c.g.dialed(c, netip.Addr{}, err) })
		return
	}
	c.mu.Lock()
	c.c = nc
	closing := c.closing
	c.mu.Unlock()
	if closing {
		nc.Close()
		return
	}
	c.send([]byte(preamble))
	from := nc.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if !c.g.cfg.Moves || !usable(from, c.g.cfg.Bind.Addr()) {
		from = netip.Addr{}
	}
	if c.g.call(func(*node) { c.g.dialed(c, from, nil) }) {
		c.read()
	}
	nc.Close()
}

// read hands in frames until the stream ends. Only a stranger's first frame
// and a frame that has begun have a deadline: a watch link idles for ever.
func (c *conn) read() {
	r := bufio.NewReaderSize(c.c, 512)
	fromDialler := c.id < 0
	c.c.SetReadDeadline(time.Now().Add(helloFor))
	err := c.readPreamble(r)
	for first := true; err == nil; first = false {
		var data []byte
		data, err = c.g.seal.readFrame(r, fromDialler, func() {
			if !first || !fromDialler { // a stranger has no more time for being slow
				c.c.SetReadDeadline(time.Now().Add(bodyFor))
			}
		})
		if err != nil && fromDialler && first {
			c.refuse(err)
		}
		if err == nil {
			c.c.SetReadDeadline(time.Time{})
			if !c.g.call(func(*node) { c.g.frame(c, data) }) {
				return
			}
		}
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("closed the connection")
	}
	c.g.call(func(*node) { c.g.endConn(c.id, err) })
}

func (c *conn) readPreamble(r io.Reader) error {
	if c.id > 0 {
		return nil
	}
	var p [len(preamble)]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return err
	}
	if string(p[:7]) != preamble[:7] {
		err := notHamlet(p[:])
		c.g.strange.seen(c.from.Addr(), err)
		return err
	}
	return nil
}

// refuse tells the dialler why, in clear, before the stream ends.
func (c *conn) refuse(err error) {
	if b := denial(err); b != nil {
		c.g.strange.seen(c.from.Addr(), err)
		c.c.SetWriteDeadline(time.Now().Add(helloFor))
		c.c.Write(b)
	}
}

// send queues b without ever waiting for the peer.
func (c *conn) send(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c == nil {
		return // still dialling: nobody to tell
	}
	if c.queued+len(b) > maxQueued {
		c.c.Close()
		return
	}
	c.queue, c.queued = append(c.queue, b), c.queued+len(b)
	if !c.writing {
		c.writing = true
		c.g.wg.Go(c.write)
	}
}

// write writes the queue, then ends, closing the stream if that is wanted.
func (c *conn) write() {
	for {
		c.mu.Lock()
		if len(c.queue) == 0 {
			c.writing = false
			if c.closing {
				c.c.Close()
			}
			c.mu.Unlock()
			return
		}
		b := bytes.Join(c.queue, nil)
		c.queue, c.queued = nil, 0
		c.mu.Unlock()
		c.c.SetWriteDeadline(time.Now().Add(bodyFor))
		if _, err := c.c.Write(b); err != nil {
			c.c.Close()
		}
	}
}

// finish closes after what is queued has gone out, abort at once.
func (c *conn) finish() { c.end(false) }
func (c *conn) abort()  { c.end(true) }

func (c *conn) end(now bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	if c.c == nil {
		c.cancel()
	} else if now || !c.writing {
		c.c.Close()
	}
}

// ---- what the agent asks of the loop ----

var errStopped = errors.New("the agent is stopping")

// do runs f in the loop and waits for it.
func (g *Gossip) do(f func(*node)) error {
	ran := make(chan struct{})
	if !g.call(func(n *node) { f(n); close(ran) }) {
		return errStopped
	}
	<-ran
	return nil
}

// view runs f, which only reads, in the loop, or on what the loop has left.
func (g *Gossip) view(f func(*node)) {
	if g.do(f) != nil {
		<-g.done
		f(g.node)
	}
}

// Members returns what is believed of all members, sorted by name.
func (g *Gossip) Members() (ms []Member) {
	g.view(func(n *node) { ms = n.members() })
	return ms
}

// Self returns this node's own record; its Addr is the advertised one.
func (g *Gossip) Self() (m Member) {
	g.view(func(n *node) { m = n.self.Member })
	return m
}

// Join makes one attempt at every address of every name in addrs, all at the
// same time. It returns how many answered; the error tells of those that did
// not, with the address and the reason.
func (g *Gossip) Join(addrs []string) (int, error) {
	ips, errs := resolve(g.ctx, addrs)
	ch := make(chan joined, 1)
	if err := g.do(func(n *node) {
		g.tokens++
		g.joins[g.tokens] = ch
		n.join(g.now(), g.tokens, ips, errs)
	}); err != nil {
		return 0, err
	}
	select {
	case j := <-ch:
		if len(j.errs) > 0 {
			return j.ok, errors.New(strings.Join(j.errs, "; "))
		}
		return j.ok, nil
	case <-g.done:
		return 0, cmp.Or(g.err, errStopped)
	}
}

// UserEvent sends a user event to every member, this one included. Name and
// payload together may take 1,024 bytes.
func (g *Gossip) UserEvent(name string, payload []byte, coalesce bool) error {
	return g.ask(func(n *node) error { return n.userEvent(g.now(), name, payload, coalesce) })
}

// ForceLeave makes a failed member left, everywhere; with prune it vanishes.
func (g *Gossip) ForceLeave(name string, prune bool) error {
	return g.ask(func(n *node) error { return n.forceLeave(g.now(), name, prune) })
}

func (g *Gossip) ask(f func(*node) error) (err error) {
	return cmp.Or(g.do(func(n *node) { err = f(n) }), err)
}

// Leave tells everybody that this node leaves, waits up to a second for the
// watchers to know, and stops the loop.
func (g *Gossip) Leave() error {
	err := g.do(func(n *node) { n.startLeave(g.now()) })
	<-g.done
	return err
}

// Close stops the loop at once, without leaving.
func (g *Gossip) Close() {
	g.quit()
	<-g.done
}

// Done is closed when the loop has ended.
func (g *Gossip) Done() <-chan struct{} { return g.done }

// Err says, after Done, why the loop ended by itself; nil if it was told to.
func (g *Gossip) Err() error { return g.err }

// ---- addresses and names ----

func (g *Gossip) resolveSeeds() {
	addrs, errs := resolve(g.ctx, g.cfg.Seeds)
	g.do(func(n *node) { n.seedsResolved(g.now(), addrs, errs) })
}

// resolve looks up all addresses of all hosts at the same time; a host without
// a port means 7946. What takes longer than 1.5 s counts as failed.
func resolve(ctx context.Context, hosts []string) (addrs []netip.AddrPort, errs []string) {
	ctx, cancel := context.WithTimeout(ctx, resolveFor)
	defer cancel()
	type result struct {
		addrs []netip.AddrPort
		err   error
	}
	results := make([]result, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() { results[i].addrs, results[i].err = resolveOne(ctx, h, defaultPort) })
	}
	wg.Wait()
	for i, r := range results {
		if r.err != nil {
			errs = append(errs, fmt.Sprintf("%s: %v", hosts[i], r.err))
		}
		for _, a := range r.addrs {
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs, errs
}

// resolveOne looks up all addresses of one host; port stands in for a missing one.
func resolveOne(ctx context.Context, s, port string) ([]netip.AddrPort, error) {
	host, port, err := hostPort(s, port)
	if err != nil {
		return nil, err
	}
	p, _ := strconv.ParseUint(port, 10, 16)
	if ip, err := netip.ParseAddr(host); err == nil { // looked up, it would lose its zone
		return []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), uint16(p))}, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(p)))
	}
	return addrs, nil
}

// hostPort splits HOST, HOST:PORT, IP, [IPv6] or [IPv6]:PORT; port stands in
// for a missing one.
func hostPort(s, port string) (string, string, error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, port, nil
	}
	h, p, err := net.SplitHostPort(s)
	if err != nil {
		h, p, err = net.SplitHostPort(s + ":" + port)
	}
	_, perr := strconv.ParseUint(p, 10, 16)
	odd := func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(" /@[]", r) }
	if err != nil || perr != nil || strings.HasPrefix(h, "-") || strings.ContainsFunc(h, odd) {
		return "", "", fmt.Errorf("%q is not an address", s)
	}
	return h, p, nil
}

// ---- strangers ----

// strangers logs what unwelcome peers do: one line per peer a minute, at most
// ten lines a minute in all, and counts the rest. Safe for concurrent use.
type strangers struct {
	log     *log.Logger
	dropped atomic.Int64 // packets lost to a full inbox
	mu      sync.Mutex
	minute  time.Time
	peers   map[netip.Addr]bool
	hidden  int
}

func (s *strangers) seen(who netip.Addr, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.minute) >= time.Minute {
		if drops := s.dropped.Swap(0); s.hidden > 0 || drops > 0 {
			s.log.Printf("[WARN] %d more like it were dropped, and %d packets for want of time", s.hidden, drops)
		}
		s.minute, s.peers, s.hidden = now, make(map[netip.Addr]bool), 0
	}
	if s.peers[who] || len(s.peers) >= 10 {
		s.hidden++
		return
	}
	s.peers[who] = true
	if who.IsValid() {
		s.log.Printf("[WARN] dropped what came from %s: %v", who, err)
	} else {
		s.log.Printf("[WARN] %v", err)
	}
}
