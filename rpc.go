// rpc.go: all that is said over TCP, by agents among themselves and by commands
// with their agent.
//
// Both speak one dialect: a hello each way with a challenge, then frames, each
// sealed and bound to both challenges, its direction and its count. A session is
// straight blocking code in a goroutine; what it learns it tells the loop, which
// it asks for what it shall say. Here are the seal (of datagrams, too), the
// handshake, the bound on who may come in, the sessions of agents (look, link,
// exchange), and those of commands. What a claim means is not known here.

package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxInbound  = 512              // accepted connections at a time, of agents
	maxRPCConns = 256              // and of commands
	maxTables   = 16               // exchanges that others have dialled, at a time
	maxDials    = 64               // addresses tried in one join
	maxWatch    = 4096             // events that wait for a slow watcher
	pageSize    = 40               // members in a frame
	helloFor    = 2 * time.Second  // for a stranger's hello and first frame
	frameFor    = 5 * time.Second  // for any other frame
	sessionFor  = 1800 * ms        // until the other side of a session has answered
	linkLook    = 30 * time.Second // between looks whether a link's member is still one
	linkMax     = 30 * time.Second // between tries to have a link
	busyFor     = time.Second      // until a place for an exchange must be free
)

// ---- the seal ----

// xaes is AES-256-GCM with nonces of 192 bits: XAES-256-GCM of c2sp.org/XAES-256-GCM. Random ones do not
// repeat, however many messages one key sees (2^80 at a risk of 2^-32).
type xaes struct {
	block cipher.Block
	k1    [aes.BlockSize]byte
}

const xaesNonce = 24

func newXAES(key []byte) (x xaes, err error) {
	if x.block, err = aes.NewCipher(key); err != nil {
		return x, err
	}
	x.block.Encrypt(x.k1[:], x.k1[:])
	carry := byte(0)
	for i := len(x.k1) - 1; i >= 0; i-- {
		carry, x.k1[i] = x.k1[i]>>7, x.k1[i]<<1|carry
	}
	x.k1[len(x.k1)-1] ^= carry * 0x87
	return x, nil
}

// derived is AES-256-GCM under the key that belongs to a nonce, whose last twelve bytes it takes.
func (x xaes) derived(nonce []byte) cipher.AEAD {
	var key []byte
	for i := range byte(2) {
		m := append([]byte{0, i + 1, 'X', 0}, nonce[:12]...)
		for j := range m {
			m[j] ^= x.k1[j]
		}
		x.block.Encrypt(m, m)
		key = append(key, m...)
	}
	block, _ := aes.NewCipher(key) // of 32 bytes: no error
	aead, _ := cipher.NewGCM(block)
	return aead
}

// seal closes and opens what travels. With keys everything is authenticated before anything is decoded,
// together with for whom it is, so that what was said to one run of a member cannot be played to another.
// Safe for concurrent use.
type seal struct {
	cluster string
	keys    []xaes // the first one seals, any opens
}

// newSeal makes the seal of a cluster; keys have 32 bytes.
func newSeal(cluster string, keys [][]byte) (*seal, error) {
	s := &seal{cluster: cluster}
	for _, k := range keys {
		x, err := newXAES(k)
		if err != nil {
			return nil, err
		}
		s.keys = append(s.keys, x)
	}
	return s, nil
}

func (s *seal) keyed() bool { return len(s.keys) > 0 }

// tag tells in clear for whom something is, by a hash.
func (s *seal) tag(whom string) []byte {
	h := fnv.New32a()
	io.WriteString(h, s.cluster+"\x00"+whom)
	return h.Sum(nil)
}

// close appends to dst what data becomes for whom.
func (s *seal) close(dst, data []byte, whom string) []byte {
	if dst = append(dst, s.tag(whom)...); !s.keyed() {
		return append(dst, data...)
	}
	var nonce [xaesNonce]byte
	rand.Read(nonce[:]) // never fails
	return s.keys[0].derived(nonce[:]).Seal(append(dst, nonce[:]...), nonce[12:], data, []byte(whom+"\x00"+s.cluster))
}

// open undoes that.
func (s *seal) open(b []byte, whom string) ([]byte, error) {
	if len(b) < 4 || !bytes.Equal(b[:4], s.tag(whom)) {
		return nil, errNotForMe
	}
	if b = b[4:]; !s.keyed() {
		return b, nil
	}
	for _, k := range s.keys {
		if len(b) < xaesNonce {
			break
		}
		if out, err := k.derived(b).Open(nil, b[12:xaesNonce], b[xaesNonce:], []byte(whom+"\x00"+s.cluster)); err == nil {
			return out, nil
		}
	}
	return nil, errOtherKey
}

const (
	protocolVersion = 2
	flagSealed      = 1 << 7
	flagAnyRun      = 1 << 6 // not bound to one run of the receiver: only a ping is not
)

func datagramFor(name string, born uint64) string {
	return "datagram " + strconv.FormatUint(born, 36) + " " + name
}

// A datagram is a byte of version and flags, and what data becomes for the receiver's run that was born then;
// 0: for any.
func (s *seal) closeDatagram(data []byte, name string, born uint64) []byte {
	flags := byte(protocolVersion)
	if born == 0 {
		flags |= flagAnyRun
	}
	if s.keyed() {
		flags |= flagSealed
	}
	return s.close(append(make([]byte, 0, 64+len(data)), flags), data, datagramFor(name, born))
}

// openDatagram opens one; errNotForMe: it is for another cluster, a former owner of the address, or a former
// run of name.
func (s *seal) openDatagram(b []byte, name string, born uint64) (data []byte, anyRun bool, err error) {
	if len(b) < 5 || b[0]&^(flagSealed|flagAnyRun) != protocolVersion {
		return nil, false, errVersion
	}
	if anyRun = b[0]&flagAnyRun != 0; anyRun {
		born = 0
	}
	data, err = s.open(b[1:], datagramFor(name, born))
	switch sealed := b[0]&flagSealed != 0; {
	case errors.Is(err, errNotForMe):
	case len(b) > maxDatagram:
		err = errors.New("sent a datagram that is too long")
	case sealed && !s.keyed():
		err = errKeyless
	case !sealed && s.keyed():
		err = errKeyed
	}
	return data, anyRun, err
}

// ---- the handshake, and frames ----

// What is wrong with who is at the other end, as seen from this one.
var (
	errVersion  = errors.New("speaks another version of the protocol: run the same hamlet on both sides")
	errCluster  = errors.New("belongs to another cluster: give both the same -cluster")
	errKeyless  = errors.New("wants a key, and this agent has none: start this one with -encrypt too")
	errKeyed    = errors.New("has no key, and this agent has one: start that one with -encrypt too")
	errOtherKey = errors.New("has another key: give both the same -encrypt")
	errNotForMe = errors.New("sent what belongs elsewhere")
	errSilent   = errors.New("hung up without a word: it is no hamlet agent (a Serf agent hangs up so)")
	errHungUp   = errors.New("closed the connection")
)

// wrongPort is the error of who comes to a port of the other kind; the number is that of the agent's right
// one.
type wrongPort struct {
	kind portKind
	port uint16
}

func (w wrongPort) Error() string {
	if w.kind == rpcPort {
		return fmt.Sprintf("is the RPC port of a hamlet agent, which gossips on port %d: join that one", w.port)
	}
	return fmt.Sprintf("is the gossip port of a hamlet agent, whose RPC is on port %d", w.port)
}

// notHamlet is the error of a peer that begins like this.
type notHamlet []byte

func (b notHamlet) Error() string {
	return fmt.Sprintf("is no hamlet agent (it says %.8q): is this the right port?", []byte(b))
}

// portKind is what a port is for.
type portKind byte

const (
	gossipPort portKind = 'g'
	rpcPort    portKind = 'r'
)

// A hello is a line at which an HTTP server answers at once, the kind of the port and the number of the
// agent's other one, whether there is a key, the cluster's tag, and a challenge.
const (
	helloLine = "HAMLET/2\r\n\r\n"
	helloSize = len(helloLine) + 1 + 1 + 2 + 4 + 16
)

// door is how connections to ports of one kind begin.
type door struct {
	*seal
	kind  portKind
	other uint16 // the agent's port of the other kind
}

func (d *door) hello() []byte {
	b := append([]byte(helloLine), byte(d.kind), 0, byte(d.other>>8), byte(d.other))
	if d.keyed() {
		b[len(helloLine)+1] = 1
	}
	return append(append(b, d.tag("")...), rand.Text()[:16]...) // 80 bits
}

// check says what is wrong with the hello of the other side.
func (d *door) check(b []byte) error {
	switch is := b[len(helloLine):]; {
	case string(b[:len(helloLine)]) != helloLine:
		return errVersion
	case portKind(is[0]) != d.kind:
		return wrongPort{portKind(is[0]), binary.BigEndian.Uint16(is[2:])}
	case !bytes.Equal(is[4:8], d.tag("")):
		return errCluster
	case is[1] != 0 && !d.keyed():
		return errKeyless
	case is[1] == 0 && d.keyed():
		return errKeyed
	}
	return nil
}

// session is a connection whose both sides have said hello. A frame is its length and its sealed body. That
// it opens proves that the other side has the key and answers this challenge, and that no frame is missing
// before it. After the first error, err, nothing is sent or read any more.
type session struct {
	net.Conn
	seal      *seal
	context   string // both challenges
	dialled   bool
	sent, got uint64
	err       error
}

// meet exchanges hellos: the dialler's comes first. Whoever has not answered a challenge gets nothing else.
func (d *door) meet(c net.Conn, dialled bool) *session {
	mine, theirs := d.hello(), make([]byte, helloSize)
	s := &session{Conn: c, seal: d.seal, dialled: dialled}
	if dialled {
		_, s.err = c.Write(mine)
	}
	n, err := io.ReadFull(c, theirs)
	switch {
	case s.err != nil:
	case n > 0 && (n < 7 || string(theirs[:7]) != helloLine[:7]):
		s.err = notHamlet(theirs[:n])
	case n == 0 && dialled && !timedOut(err):
		s.err = errSilent
	case err != nil:
		s.err = err
	case !dialled:
		_, s.err = c.Write(mine)
	}
	if s.err == nil {
		s.err = d.check(theirs)
	}
	if _, wrong := errors.AsType[wrongPort](s.err); wrong && !dialled {
		s.err = errors.New("looks for the other port of this agent")
	}
	if s.context = string(mine) + string(theirs); !dialled {
		s.context = string(theirs) + string(mine)
	}
	return s
}

func (s *session) frameContext(dialled bool, count uint64) string {
	return fmt.Sprint("frame ", dialled, count, s.context)
}

// write sends one frame: a message, and what may follow it.
func (s *session) write(message any, us ...update) { s.writeBytes(wire.encodeAll(message, us)) }

func (s *session) writeBytes(data []byte) {
	if s.err != nil {
		return
	}
	b := s.seal.close(make([]byte, 4, 64+len(data)), data, s.frameContext(s.dialled, s.sent))
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	s.sent++
	s.SetWriteDeadline(time.Now().Add(frameFor))
	_, s.err = s.Write(b)
}

// read reads one frame: message, and what may follow it.
func (s *session) read(message any) (us []update) {
	b := s.readBytes()
	if s.err == nil {
		if b, s.err = wire.decode(b, message); s.err == nil {
			us, s.err = wire.decodeAll(b)
		}
	}
	return us
}

// readBytes reads one frame until the deadline that is set. A length of 0 says that the other side could not
// open the first one.
func (s *session) readBytes() (data []byte) {
	var size [4]byte
	if s.err == nil {
		_, s.err = io.ReadFull(s, size[:])
	}
	n := binary.BigEndian.Uint32(size[:])
	switch {
	case s.err != nil:
		return nil
	case n == 0:
		s.err = errOtherKey
		return nil
	case n > maxFrame+1024:
		s.err = fmt.Errorf("sent a frame of %d bytes, the limit is %d", n, maxFrame)
		return nil
	}
	b := make([]byte, n)
	if _, s.err = io.ReadFull(s, b); s.err == nil {
		data, s.err = s.seal.open(b, s.frameContext(!s.dialled, s.got))
		if s.got++; s.err != nil && !s.dialled {
			s.Write(make([]byte, 4))
		}
	}
	return data
}

func (s *session) patience(d time.Duration) { s.SetReadDeadline(time.Now().Add(d)) }

func timedOut(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// plain says in plain words how a session has ended.
func plain(err error) error {
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE):
		return errHungUp
	case timedOut(err) || errors.Is(err, context.Canceled):
		return fmt.Errorf("no answer within %v", sessionFor)
	}
	return reason(err)
}

// ---- who may come in ----

// guests bounds the accepted connections. When there are too many, the oldest that has proven nothing goes,
// so that strangers who hold connections open keep nobody out. Safe for concurrent use.
type guests struct {
	limit  int
	served sync.WaitGroup
	mu     sync.Mutex
	here   []*guest // oldest first
}

type guest struct {
	net.Conn
	proven atomic.Bool // it has answered a challenge
}

// guestLimit leaves half of the file descriptors for everything else.
func guestLimit() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return maxInbound
	}
	return int(min(maxInbound, max(uint64(r.Cur)/2, 8)))
}

// accept serves what comes in at ln until it is closed.
func (gs *guests) accept(ln net.Listener, strange *strangers, serve func(*guest) error) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			strange.seen(netip.Addr{}, fmt.Errorf("cannot accept a connection at %s: %w", ln.Addr(), err))
			time.Sleep(50 * ms) // out of file descriptors: some will come back
			continue
		}
		c.(*net.TCPConn).SetReadBuffer(64 << 10) // what a stranger may make the kernel hold
		c.SetDeadline(time.Now().Add(helloFor))
		g := gs.add(c)
		gs.served.Go(func() {
			defer gs.remove(g)
			// Who says nothing, or hangs up, looks whether the port is open.
			if err := plain(serve(g)); err != nil && !errors.Is(err, errHungUp) && !errors.Is(err, net.ErrClosed) && !timedOut(err) {
				strange.seen(remote(c), err)
			}
		})
	}
}

func remote(c net.Conn) netip.Addr { return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap() }

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

// remove closes g and forgets it; nil: all.
func (gs *guests) remove(g *guest) {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	gs.here = slices.DeleteFunc(gs.here, func(o *guest) bool {
		if g == nil || o == g {
			o.Close()
		}
		return o == g
	})
}

// ---- sessions of agents ----

// sessions are those of this agent with others.
type sessions struct {
	wg     sync.WaitGroup
	guests guests
	tables chan struct{} // a place for each exchange that others have dialled
}

// connect dials to. A lost SYN costs a second in the kernel, so it dials again after each of redial, without
// giving up the first; joins: for a join.
func (g *Gossip) connect(ctx context.Context, to netip.AddrPort, joins bool, redial ...time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dialer, ip := net.Dialer{KeepAlive: -1}, g.cfg.Bind.Addr()
	if !ip.IsUnspecified() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	}
	type result struct {
		c   net.Conn
		err error
	}
	results := make(chan result, 1+len(redial))
	dial := func() {
		c, err := dialer.DialContext(ctx, "tcp", to.String())
		results <- result{c, err}
	}
	go dial()
	var later []*time.Timer
	for _, after := range redial {
		later = append(later, time.AfterFunc(after, dial))
	}
	r, left := <-results, len(redial)
	for ; r.err != nil && left > 0 && ctx.Err() == nil && !errors.Is(r.err, syscall.ECONNREFUSED); left-- {
		r = <-results
	}
	for _, d := range later {
		if d.Stop() {
			left--
		}
	}
	if left > 0 {
		cancel()
		go func() {
			for range left {
				if late := <-results; late.c != nil {
					late.c.Close()
				}
			}
		}()
	}
	c, err := r.c, r.err
	switch {
	case err == nil:
		return c, g.dialledFrom(c, joins)
	case !ip.IsUnspecified() && ip.Is4() != to.Addr().Is4():
		err = fmt.Errorf("this agent is bound to %s, an address of another kind", ip)
	case ip.IsLoopback() && !to.Addr().IsLoopback():
		err = fmt.Errorf("this agent is bound to %s, from where no other machine can be reached (-bind sets another address)", ip)
	}
	return nil, plain(err)
}

// dialledFrom tells the node from which address a dial went out, where it may take another one.
func (g *Gossip) dialledFrom(c net.Conn, joins bool) error {
	ip, now := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(), uint64(time.Now().UnixMilli())
	if !g.cfg.Moves || !usable(ip, g.cfg.Bind.Addr()) {
		return nil
	}
	return g.do(func(n *node) error {
		own := n.self.Addr.Addr()
		n.moved(ip, ip != own && !isMine(own), joins, now)
		return nil
	})
}

// begin opens a session with a first frame of kind k. It returns the welcome: who is there, and what it says
// of this node.
func (g *Gossip) begin(c net.Conn, k kind) (s *session, w head, about []update) {
	s = g.door.meet(c, true)
	h := head{}
	if err := g.do(func(n *node) error { h = n.head(k); return nil }); err != nil {
		s.err = err
	}
	s.write(&h)
	about = s.read(&w)
	if s.err == nil && (w.Kind != kWelcome || validName(w.From) != nil) {
		s.err = errMalformed
	}
	return s, w, about
}

// look looks at a member, and tells the node what it sees. A dying process's listener accepts until the
// kernel has come to it: who dialled just before is reset, and then it refuses. So whoever is cut off looks
// again.
func (g *Gossip) look(l look) {
	ctx, cancel := context.WithTimeout(g.ctx, probeFor)
	defer cancel()
	tell := func(v verdict, w head) { g.call(func(n *node) { n.saw(sight{l, v, w.From, w.born()}) }) }
	for range 4 {
		c, err := g.connect(ctx, l.m.Addr, false, 150*ms, 300*ms)
		if errors.Is(err, syscall.ECONNREFUSED) {
			tell(vRefused, head{})
		}
		if err != nil {
			return
		}
		tell(vSilent, head{})
		deadline, _ := ctx.Deadline()
		c.SetDeadline(deadline)
		s, w, _ := g.begin(c, kLook)
		c.Close()
		switch {
		case s.err == nil:
			tell(vAlive, w)
			return
		case ctx.Err() != nil || timedOut(s.err):
			return // it accepts and is silent
		}
		tell(vNone, head{})
	}
}

// relink makes the watch links that shall stand, and ends all others.
func (g *Gossip) relink(self Member, links []Member) {
	old := g.links
	g.links = make(map[string]context.CancelFunc)
	for _, m := range links {
		key := fmt.Sprint(self.Born, m.Born, m.Name)
		if g.links[key] = old[key]; old[key] == nil {
			ctx, cancel := context.WithCancel(g.ctx)
			g.links[key] = cancel
			g.wg.Go(func() { g.keepLink(ctx, m) })
		}
		delete(old, key)
	}
	for _, cancel := range old {
		cancel()
	}
}

// keepLink holds a watch link to m until ctx is done. Its end is told at once; where none can be had it is
// tried more and more rarely: each failure starts a probe, and a firewall stays.
func (g *Gossip) keepLink(ctx context.Context, m Member) {
	for tries := 1; ; tries++ {
		up, err := g.linkOnce(ctx, m)
		if up {
			tries = 0
		}
		if ctx.Err() != nil || !g.call(func(n *node) { n.linkEnded(m, tries, errors.Is(err, syscall.ECONNREFUSED)) }) {
			return
		}
		select {
		case <-time.After(min(time.Second<<min(max(tries-1, 0), 10), linkMax)):
		case <-ctx.Done():
			return
		}
	}
}

// linkOnce returns when the link has ended, or could not be had (up false).
func (g *Gossip) linkOnce(ctx context.Context, m Member) (up bool, err error) {
	short, cancel := context.WithTimeout(ctx, sessionFor)
	defer cancel()
	c, err := g.connect(short, m.Addr, false, 300*ms, 700*ms)
	if err != nil {
		return false, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(sessionFor))
	s, w, _ := g.begin(c, kLink)
	if s.err != nil || w.From != m.Name || w.born() != m.Born { // another run answers there: this one has ended
		return s.err == nil, s.err
	}
	defer context.AfterFunc(ctx, func() {
		(&session{Conn: s.Conn, seal: s.seal, context: s.context, dialled: true, sent: s.sent}).write(&head{Kind: kBye}) // nobody has died
		s.Close()
	})()
	c.SetDeadline(time.Time{})
	s.read(&head{})
	return true, s.err
}

// compare compares tables with whoever is at to, as x says; joins: in order to join. It fills x.with.
func (g *Gossip) compare(to netip.AddrPort, x *exchange, joins bool) error {
	ctx, cancel := context.WithTimeout(g.ctx, sessionFor)
	defer cancel()
	c, err := g.connect(ctx, to, joins, 300*ms, 700*ms)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(sessionFor))
	s, w, about := g.begin(c, kExchange)
	x.dialled, x.with.Addr = true, to
	more := false
	for wait := true; wait && s.err == nil; {
		s.err = g.do(func(n *node) error { more = w.Digest != n.digest(); return n.welcomed(x, w, about) })
		if wait = errors.Is(s.err, errWait); wait {
			s.err = nil
			time.Sleep(20 * ms)
		}
	}
	for more && s.err == nil {
		more = g.say(s, x)
		for rest := true; rest && s.err == nil; {
			rest = g.hear(s, x)
		}
	}
	if s.err != nil {
		return plain(s.err)
	}
	return g.do(func(n *node) error { n.exchanged(x); return nil })
}

// say sends the next piece of the table, hear takes one; more: it is not the last.
func (g *Gossip) say(s *session, x *exchange) (more bool) {
	var frame []byte
	if err := g.do(func(n *node) error { frame, more = n.piece(x); return nil }); err != nil {
		s.err = err
	}
	s.writeBytes(frame)
	return more
}

func (g *Gossip) hear(s *session, x *exchange) (more bool) {
	s.patience(frameFor)
	var h head
	if us := s.read(&h); s.err == nil {
		s.err = g.do(func(n *node) (err error) {
			bad := 0
			if more, bad, err = n.merge(x, h, us); bad > 0 {
				g.strange.seen(remote(s), fmt.Errorf("sent %d bad records in a table", bad))
			}
			return err
		})
	}
	return more
}

// serve answers one agent that has dialled.
func (g *Gossip) serve(c *guest) error {
	var h head
	s := g.door.meet(c, false)
	s.read(&h)
	if s.err == nil && (validName(h.From) != nil || h.Kind < kLook || h.Kind > kExchange) {
		s.err = errMalformed
	}
	if s.err != nil {
		return s.err
	}
	c.proven.Store(true)
	if h.Kind == kExchange {
		select {
		case g.tables <- struct{}{}:
			defer func() { <-g.tables }()
		case <-time.After(busyFor):
			return errors.New("wants to compare tables while too many others do")
		}
	}
	var w head
	var about []update
	s.err = g.do(func(n *node) error { w, about = n.welcome(h); return nil })
	s.write(&w, about...)
	from := Member{Name: h.From, Born: h.born()}
	if h.Kind == kLink {
		return g.serveLink(s, from)
	}
	x := &exchange{with: from}
	for more := h.Kind == kExchange; more && s.err == nil; { // EOF: the tables are the same
		more = g.hear(s, x)
		for rest := true; rest && s.err == nil; {
			rest = g.say(s, x)
		}
	}
	return s.err
}

// serveLink holds a link that m has dialled, as long as m is a member: that of one whose host vanished would
// stay for ever.
func (g *Gossip) serveLink(s *session, m Member) error {
	for wait := helloFor; ; wait = linkLook {
		var h head
		s.patience(wait)
		switch s.read(&h); {
		case s.err == nil && h.Kind == kBye:
			return nil
		case s.err == nil:
			return errMalformed
		case !timedOut(s.err):
			g.call(func(n *node) { n.linkEnded(m, 0, false) })
			return nil
		}
		s.err = nil
		if g.do(func(n *node) error {
			if e := n.t.get(m.Name); e == nil || (run{e, m.Born}).over() {
				return errHungUp
			}
			return nil
		}) != nil {
			return nil
		}
	}
}

// Join compares tables with every address of every name in addrs once, all at the same time. It returns how
// many answered; the error tells of those that did not, with the address and the reason.
func (g *Gossip) Join(addrs []string, replay bool) (int, error) {
	names, errs, _ := g.joinAll(addrs, exchange{command: true, replay: replay}, func(string) {})
	if len(errs) > 0 {
		return len(names), errors.New(strings.Join(errs, "; "))
	}
	return len(names), nil
}

// joinSeeds is one round of joining the seeds.
func (g *Gossip) joinSeeds() {
	names, errs, why := g.joinAll(g.cfg.Seeds, exchange{}, func(name string) { g.call(func(n *node) { n.seedAnswered(name) }) })
	g.call(func(n *node) { n.seedsTried(len(names), errs, why) })
}

// joinAll calls each for each name that answers, at once; why: the name is taken.
func (g *Gossip) joinAll(addrs []string, how exchange, each func(string)) (names, errs []string, why error) {
	ips, errs := resolve(g.ctx, addrs)
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, ip := range ips[:min(len(ips), maxDials)] {
		all.Go(func() {
			x := how
			err := g.compare(ip, &x, true)
			if err == nil {
				each(x.with.Name)
			}
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, errTaken) {
				why = err
			}
			if err == nil {
				names = append(names, x.with.Name)
			} else {
				errs = append(errs, fmt.Sprintf("%s: %v", ip, err))
			}
		})
	}
	all.Wait()
	return names, errs, why
}

// ---- sessions of commands ----

// request is what a command asks of its agent. Flat: a slice or a map could claim more elements than it
// brings.
type request struct {
	Op      string // members, join, leave, force-leave, event, tags, query, watch or info
	Name    string
	Payload []byte
	Args    string // separated by NUL
	Drop    string // of tags: those to delete, separated by NUL
	Prune   bool
	Replay  bool
	Merge   bool // of an event: coalesce
	Within  time.Duration
}

// answer is one frame of what an agent says to a command; updates may follow.
type answer struct {
	Error string
	More  bool   // it is not the last
	Count int    // join: how many answered
	Text  string // separated by NUL
	Kind  EventKind
	Reply reply
	At    int64 // Unix nanoseconds of the event
	Lost  int   // events that this reader was too slow for
}

// callRPC asks the agent at addr and calls each with each answer, until it returns an error (io.EOF is none
// to the caller). It gives up when the first answer, or all of them but those of a stream, take longer than
// timeout.
func callRPC(addr, token string, req request, timeout time.Duration, each func(answer, []update) error) error {
	deadline := time.Now().Add(timeout)
	c, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return unreachable(addr, timeout, err)
	}
	defer c.Close()
	c.SetDeadline(deadline)
	d, err := rpcDoor(token, 0)
	if err != nil {
		return err
	}
	b := wire.encodeAll(&req, nil)
	if len(b) > maxFrame {
		return trouble("", "the request takes %d bytes, the limit is %d", len(b), maxFrame)
	}
	s := d.meet(c, true)
	s.writeBytes(b)
	for s.err == nil {
		var a answer
		us := s.read(&a)
		switch {
		case s.err != nil:
		case a.Error != "":
			return trouble("", "%s", a.Error)
		default:
			if err := each(a, us); err == io.EOF || !a.More {
				return nil
			} else if err != nil {
				return err
			}
			if req.Op == "watch" || req.Op == "query" {
				c.SetReadDeadline(time.Time{})
			}
		}
	}
	return unreachable(addr, timeout, s.err)
}

// unreachable says why there was no answer.
func unreachable(addr string, timeout time.Duration, err error) error {
	hint := "-rpc-addr is the agent's RPC address (default " + defaultRPC + ")"
	what, again := "", false
	_, no := errors.AsType[notHamlet](err)
	port, wrong := errors.AsType[wrongPort](err)
	switch {
	case no || errors.Is(err, errSilent):
		what = "what listens at %s is not the RPC of a hamlet agent"
	case wrong:
		what = "%s " + port.Error()
	case errors.Is(err, errVersion):
		what, hint = "the agent at %s speaks another version of the RPC", "use one version for both; this is "+version
	case errors.Is(err, errKeyless):
		what, hint = "the agent at %s wants a token", "give it with -rpc-auth or SERF_RPC_AUTH"
	case errors.Is(err, errKeyed):
		what, hint = "the agent at %s has no token", "leave out -rpc-auth and SERF_RPC_AUTH"
	case errors.Is(err, errOtherKey):
		what, hint = "the agent at %s wants another token", "-rpc-auth or SERF_RPC_AUTH must be what the agent was started with"
	case timedOut(err):
		what, hint = fmt.Sprintf("the agent at %%s did not answer within %v", timeout.Round(ms)), "it may be stopped or overloaded: look at its process and its log"
		again = true
	default:
		what = fmt.Sprintf("no agent answers at %%s: %v", plain(err))
		hint = fmt.Sprintf("is the agent running? start it with '%s agent', or say where it is with -rpc-addr or SERF_RPC_ADDR", prog)
		again = true
	}
	return &failure{msg: fmt.Sprintf(what, addr), hint: hint, code: 1, again: again}
}

// rpcDoor is that of a token, which is a key: it never travels.
func rpcDoor(token string, gossip uint16) (door, error) {
	var keys [][]byte
	if token != "" {
		key := sha256.Sum256([]byte(token))
		keys = [][]byte{key[:]}
	}
	s, err := newSeal("RPC", keys)
	return door{s, rpcPort, gossip}, err
}

// rpcServer answers commands about an agent.
type rpcServer struct {
	door
	ln      net.Listener
	g       *Gossip
	info    func() []string // group, key, value; and so on
	strange strangers
	guests  guests
}

// serveRPC answers what comes in at ln.
func serveRPC(ln net.Listener, g *Gossip, token string, info func() []string) (*rpcServer, error) {
	self, _ := g.Self()
	d, err := rpcDoor(token, self.Addr.Port())
	r := &rpcServer{door: d, ln: ln, g: g, info: info, strange: strangers{log: g.cfg.Log}, guests: guests{limit: maxRPCConns}}
	r.guests.served.Go(func() { r.guests.accept(ln, &r.strange, r.serve) })
	return r, err
}

// Close takes no more requests and waits a second at most for the answers under way.
func (r *rpcServer) Close() {
	r.ln.Close()
	waitAtMost(time.Second, r.guests.served.Wait)
	r.guests.remove(nil)
}

func (r *rpcServer) serve(c *guest) error {
	var req request
	s := r.door.meet(c, false)
	s.read(&req)
	if s.err != nil {
		return fmt.Errorf("came to the RPC, and %w", s.err)
	}
	c.proven.Store(true)
	c.SetDeadline(time.Time{})
	a, err := r.do(s, req)
	if err != nil {
		a.Error = err.Error()
	}
	s.write(&a)
	return s.err
}

// do does what the request asks for, and returns the last answer.
func (r *rpcServer) do(s *session, req request) (a answer, err error) {
	g := r.g
	switch req.Op {
	case "members":
		r.members(s)
	case "join":
		if a.Count, err = g.Join(list(req.Args), req.Replay); a.Count > 0 {
			err = nil // some others may not have answered
		}
	case "leave":
		g.cfg.Log.Print("[INFO] told to leave the cluster")
		r.ln.Close() // who reads the answer may start the next agent at once
		err = g.Leave()
	case "force-leave":
		err = g.do(func(n *node) error { return n.forceLeave(req.Name, req.Prune) })
	case "event":
		err = g.do(func(n *node) error { return n.userEvent(req.Name, req.Payload, req.Merge) })
	case "tags":
		err = g.do(func(n *node) error { return n.setTags(Tags(req.Args).Map(), list(req.Drop)) })
	case "info":
		a.Text = strings.Join(r.info(), "\x00")
	case "query":
		f := newFeed(2 * maxMembers)
		if err = g.do(func(n *node) (err error) {
			var who []string
			f.query, who, err = n.query(req.Name, req.Payload, list(req.Args), req.Within)
			a.Text, g.feeds[f] = strings.Join(who, "\x00"), true
			return err
		}); err == nil {
			s.write(&answer{More: true, Text: a.Text})
			a.Text = ""
		}
		r.stream(s, f, err == nil)
	case "watch":
		f := newFeed(maxWatch)
		err = g.do(func(n *node) error { g.feeds[f] = true; return nil })
		r.members(s)
		r.stream(s, f, true)
	default:
		err = fmt.Errorf("this agent knows no request %q", req.Op)
	}
	return a, err
}

// members sends all members, few at a time: a reader that does not read costs a page, however many members
// there are.
func (r *rpcServer) members(s *session) {
	for after, more := "", true; more && s.err == nil; {
		var us []update
		if s.err = r.g.do(func(n *node) error {
			for _, m := range n.members(after, pageSize) {
				us, after = append(us, update{Member: m}), m.Name
			}
			return nil
		}); s.err == nil {
			s.write(&answer{More: true, At: time.Now().UnixNano()}, us...)
		}
		more = len(us) == pageSize
	}
}

// feed holds the events for one reader, who may be slow: a query's answers, or (query 0) all events.
type feed struct {
	query uint32
	limit int
	mu    sync.Mutex
	queue []queued
	lost  int
	ready chan struct{}
}

type queued struct {
	Event
	at time.Time
}

func newFeed(limit int) *feed { return &feed{limit: limit, ready: make(chan struct{}, 1)} }

// put never blocks; what a reader is too slow for is counted.
func (f *feed) put(ev Event) {
	if ev.Kind == EventAnswer && ev.ID != f.query || ev.Kind != EventAnswer && f.query != 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.queue) >= f.limit {
		f.lost++
		return
	}
	f.queue = append(f.queue, queued{ev, time.Now()})
	select {
	case f.ready <- struct{}{}:
	default:
	}
}

// stream sends what f brings until the reader or the agent has gone, or the query is over.
func (r *rpcServer) stream(s *session, f *feed, run bool) {
	defer r.g.call(func(*node) { delete(r.g.feeds, f) })
	gone := make(chan struct{})
	go func() { io.Copy(io.Discard, s.Conn); close(gone) }()
	for run && s.err == nil {
		select {
		case <-f.ready:
		case <-gone:
			return
		case <-r.g.done:
			return
		}
		f.mu.Lock()
		queue, lost := f.queue, f.lost
		f.queue, f.lost = nil, 0
		f.mu.Unlock()
		for _, ev := range queue {
			u := updateOf(ev.Event)
			u.Member = ev.Member
			if run = ev.Kind != EventAnswer || ev.Reply != replyNone; run {
				s.write(&answer{More: true, Kind: ev.Kind, Reply: ev.Reply, At: ev.at.UnixNano(), Lost: lost}, u)
			}
			lost = 0
		}
	}
}
