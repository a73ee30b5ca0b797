// rpc.go: all that is said over TCP.
//
// Here are the handshake, the bound on inbound connections, the sessions of agents (probe, link, sync), and those of
// commands; then the commands' side of it, and the addresses to dial and to listen on. Agents and commands speak
// one dialect: a hello each way with a challenge, then frames, each sealed and bound to both challenges, its direction
// and its count. A session is straight blocking code in a goroutine: it posts what it learns to the loop, and asks the
// loop what to send. What a claim means is not known here.

package main

import (
	"bytes"
	"context"
	"crypto/cipher"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
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
	maxInbound     = 768              // accepted connections at a time, of agents and commands
	maxMerging     = 4                // chunks of tables that wait for the loop at a time
	maxDials       = 64               // addresses of one kind that a seed may have
	maxResponses   = 3 * maxMembers   // frames of an answer that is no stream: a query's has two for each member
	pageSize       = 40               // members in a frame
	textPage       = 8 << 10          // bytes of text in a frame, about; of one fact, at most
	helloTimeout   = 2 * time.Second  // for a stranger's hello
	frameTimeout   = 5 * time.Second  // for any frame: the first one takes a round trip
	sessionTimeout = 10 * time.Second // for the answer in a session: three round trips, and what TCP sends again
	maxLinkWait    = 30 * time.Second // between tries to link, and between checks whether a link's member is still one
	eventPatience  = 4 * time.Second  // for which an event waits for its turn: less than its command waits
	syncTimeout    = 2 * time.Minute  // for a whole state sync: the largest over a line of 1 Mbit/s
)

// ---- the handshake, and frames ----

// What is wrong with the other end of a session, as seen from this one.
var (
	errVersion  = errors.New("speaks protocol")
	errCluster  = errors.New("belongs to another cluster: give both the same -cluster")
	errKeyless  = errors.New("wants a key, and this agent has none: start this one with -encrypt too")
	errKeyed    = errors.New("has no key, and this agent has one: start that one with -encrypt too")
	errOtherKey = errors.New("has another key: give both the same -encrypt")
	errNotForMe = errors.New("sent what belongs elsewhere")
	errForeign  = errors.New("is no hamlet agent")
	errRPC      = errors.New("is the RPC port of a hamlet agent")
	errGossip   = errors.New("is the gossip port of a hamlet agent")
	errSerfRPC  = errors.New("speaks the RPC of Serf, which this agent does not: see 'watch -format json' and the other " +
		"commands")
	errSilent = fmt.Errorf("hung up without a word, as a Serf agent does: it %w", errForeign)
	errHungUp = errors.New("closed the connection")
)

// A hello is a line at which an HTTP server answers at once, the kind of the port and the number of the
// agent's other one, whether there is a key, the cluster's tag, the highest protocol, and a challenge.
const (
	helloLine                = "HAMLET/5\r\n\r\n" // of protocol 5 and all after it
	helloSize                = len(helloLine) + 1 + 1 + 2 + 4 + 1 + 16
	gossipPort, rpcPort byte = 'g', 'r'
	// What a hello says of keys. With a key and without, for a time, is helloEither.
	helloInClear, helloKeyed, helloEither = 0, 1, 2
)

func (d *sealer) hello() []byte {
	keyed := byte(helloInClear)
	if !d.opensInClear() {
		keyed = helloKeyed
	} else if len(d.keys) > 0 {
		keyed = helloEither
	}
	b := append([]byte(helloLine), d.portKind, keyed, byte(d.otherPort>>8), byte(d.otherPort))
	b = append(b, d.receiverHash("")...)
	b = append(b, protocolVersion)
	challenge := make([]byte, 16)
	crand.Read(challenge)
	return append(b, challenge...)
}

// checkHello returns what is wrong with the hello of the other side.
func (d *sealer) checkHello(b []byte, dialled bool) error {
	if string(b[:len(helloLine)]) != helloLine {
		theirs := max(b[7]-'0', 4) // HAMLET/N; that of protocol 4 was HAMLET/3
		if err := checkProtocol(theirs); err != nil {
			return err
		}
		return errMalformed
	}

	is := b[len(helloLine):]
	if err := checkProtocol(is[8]); err != nil {
		return err
	}
	otherPort := binary.BigEndian.Uint16(is[2:])
	switch {
	case is[0] != d.portKind && !dialled:
		return errors.New("looks for the other port of this agent")
	case is[0] != d.portKind && d.portKind == gossipPort:
		return fmt.Errorf("%w, which gossips on port %d: join that one", errRPC, otherPort)
	case is[0] != d.portKind:
		return fmt.Errorf("%w, whose RPC is on port %d", errGossip, otherPort)
	case !bytes.Equal(is[4:8], d.receiverHash("")):
		return errCluster
	case is[1] == helloKeyed && len(d.keys) == 0:
		return errKeyless
	case is[1] == helloInClear && !d.opensInClear():
		return errKeyed
	}
	return nil
}

// session is a connection whose two sides have exchanged hellos. It sends frames: a length and a sealed body. A frame
// that opens proves that the other side has the key and has answered this side's challenge, and that no frame before it
// is missing. Like a bufio.Writer, a session keeps its first error in err, and then sends and receives nothing.
type session struct {
	conn      net.Conn     // in clear: for hellos, deadlines and the end
	from      netip.Prefix // of an accepted one: an IPv4 address, or an IPv6 network of 64 bits, which any host may have
	proven    atomic.Bool  // a frame has opened
	dialled   bool
	patient   bool          // its reader may pause for as long as it likes
	roundTrip time.Duration // until the hello came, to the side that dialled
	out, in   stream
	err       error
}

// handshake exchanges hellos, the dialler's first. The acceptor sends nothing else before its challenge is answered.
func (d *sealer) handshake(s *session) *session {
	start := time.Now()
	hellos, err := d.exchangeHellos(s.conn, s.dialled)
	s.roundTrip = time.Since(start)
	s.err = err
	s.out = d.newStream(s.dialled, hellos)
	s.in = d.newStream(!s.dialled, hellos)
	return s
}

// exchangeHellos returns both hellos, the dialler's first.
func (d *sealer) exchangeHellos(conn net.Conn, dialled bool) (hellos string, err error) {
	mine := d.hello()
	if dialled { // what cannot be written is noticed by the next read
		conn.Write(mine)
	}

	theirs := make([]byte, helloSize)
	n, err := io.ReadFull(conn, theirs)
	if bytes.Contains(theirs[:n], []byte("Command")) { // msgpack: {"Command": "handshake", ...}
		return "", errSerfRPC
	}
	if n > 0 && !bytes.HasPrefix(theirs, []byte(helloLine[:7])) {
		return "", fmt.Errorf("%w (it says %.8q): is this the right port?", errForeign, theirs[:n])
	}
	if n == 0 && dialled && !timedOut(err) {
		return "", errSilent
	}
	if err != nil {
		return "", err
	}

	if dialled {
		return string(mine) + string(theirs), d.checkHello(theirs, true)
	}
	conn.Write(mine)
	return string(theirs) + string(mine), d.checkHello(theirs, false)
}

// stream is one direction of a session. A frame's nonce is its count, and so it opens in its place alone.
type stream struct {
	tag          []byte        // opens a frame in clear: that, too, answers a challenge
	aeads        []cipher.AEAD // one for each key; of the in direction the right one alone, once a frame has opened
	sealsClear   bool
	opensInClear bool
	count        uint64 // of the frames so far
}

func (d *sealer) newStream(ofDialler bool, hellos string) stream {
	// Each side has made one hello at random: no other stream has keys that are derived for this.
	info := fmt.Sprint("stream ", ofDialler, hellos) // as in HKDF: what the keys are for
	st := stream{tag: d.receiverHash(info), sealsClear: !d.sealsWithKey(), opensInClear: d.opensInClear()}
	for _, key := range d.keys {
		if len(key) > 0 {
			aead, _ := cipher.NewGCM(d.blockFor(key, info))
			st.aeads = append(st.aeads, aead)
		}
	}
	return st
}

func (st *stream) nextNonce() []byte {
	nonce := binary.BigEndian.AppendUint64(make([]byte, 4), st.count)
	st.count++
	return nonce
}

func (st *stream) seal(dst, data []byte) []byte {
	nonce := st.nextNonce()
	if st.sealsClear {
		return append(append(dst, st.tag...), data...)
	}
	return st.aeads[0].Seal(dst, nonce, data, nil)
}

func (st *stream) open(body []byte) ([]byte, error) {
	nonce := st.nextNonce()
	for i, aead := range st.aeads {
		data, err := aead.Open(nil, nonce, body, nil)
		if err == nil {
			st.aeads = st.aeads[i : i+1]
			st.opensInClear = false
			return data, nil
		}
	}

	if !st.opensInClear {
		return nil, errOtherKey
	}
	if !bytes.HasPrefix(body, st.tag) {
		return nil, errNotForMe
	}
	st.aeads = nil
	return body[len(st.tag):], nil
}

// send sends a message, and the updates that may follow it, in one frame.
func (s *session) send(message any, us ...update) { s.sendBytes(wire.encode(nil, message, us...)) }

func (s *session) sendBytes(data []byte) {
	if s.err != nil {
		return
	}
	frame := s.out.seal(make([]byte, 4, 64+len(data)), data)
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
	if !s.patient {
		s.conn.SetWriteDeadline(time.Now().Add(frameTimeout))
	}
	_, s.err = s.conn.Write(frame)
}

// endAfter ends the session after d, however its frames trickle, unless that is stopped.
func (s *session) endAfter(d time.Duration) *time.Timer {
	return time.AfterFunc(d, func() { s.conn.Close() })
}

// receive reads one frame until the deadline that is set: a message, and the updates that may follow it.
func (s *session) receive(message any) (us []update) {
	return s.decode(s.readFrame(), message)
}

// readFrame reads a frame's sealed body. A length of 0 says that the other side could not open the first frame.
func (s *session) readFrame() []byte {
	var length [4]byte
	if s.err == nil {
		_, s.err = io.ReadFull(s.conn, length[:])
	}
	if s.err != nil {
		return nil
	}
	size := binary.BigEndian.Uint32(length[:])
	if size == 0 {
		s.err = errOtherKey
		return nil
	}
	if size > maxFrame+1024 {
		s.err = fmt.Errorf("sent a frame of %d bytes, the limit is %d", size, maxFrame)
		return nil
	}

	sealed := make([]byte, size)
	_, s.err = io.ReadFull(s.conn, sealed)
	return sealed
}

func (s *session) decode(sealed []byte, message any) (us []update) {
	if s.err != nil {
		return nil
	}
	data, err := s.in.open(sealed)
	if err != nil {
		s.err = err
		if s.proven.Load() {
			s.err = errNotForMe // that it has the key is known
		} else if !s.dialled {
			s.conn.Write(make([]byte, 4)) // a length of 0
		}
		return nil
	}

	s.proven.Store(true)
	rest, err := wire.decode(data, message)
	if err == nil {
		us, err = wire.decodeAll(rest)
	}
	s.err = err
	return us
}

func timedOut(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// plainError returns in plain words how a session has ended.
func plainError(err error) error {
	for _, closing := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, net.ErrClosed} {
		if errors.Is(err, closing) {
			return errHungUp
		}
	}
	if timedOut(err) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("no answer within %v", sessionTimeout)
	}
	return reason(err)
}

// ---- inbound connections ----

// acceptor takes connections at a port, and knows all that is under way there.
type acceptor struct {
	sealer atomic.Pointer[sealer] // keys may change
	tcp    net.Listener
	places *places // of all ports
	wg     sync.WaitGroup
	ctx    context.Context // of all connections
	quit   context.CancelFunc
	lines  *logLimit            // about those that were refused
	serve  func(*session) error // one session to its end
}

// close accepts nothing more, and ends what is under way.
func (a *acceptor) close() {
	a.tcp.Close()
	// An answer may still be on its way, to a peer that reads too slowly.
	waitAtMost(time.Second, a.wg.Wait)
	a.quit()
}

func (a *acceptor) accept() {
	for {
		c, err := a.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.lines.printf(aboutHost, "accept", levelWarn, "cannot accept a connection at %s: %v", a.tcp.Addr(), err)
			time.Sleep(50 * ms) // out of file descriptors: some will come back
			continue
		}

		c.(*net.TCPConn).SetReadBuffer(64 << 10) // what a stranger may make the kernel hold
		c.SetDeadline(time.Now().Add(helloTimeout))
		s := &session{conn: c}
		a.places.take(s, addrOf(c.RemoteAddr()))
		a.wg.Go(func() { a.serveSession(s) })
	}
}

func (a *acceptor) serveSession(s *session) {
	defer a.places.release(s)
	defer s.conn.Close()
	defer context.AfterFunc(a.ctx, func() { s.conn.Close() })()
	a.sealer.Load().handshake(s)
	s.conn.SetDeadline(time.Now().Add(frameTimeout)) // the first frame answers this hello, and may come from far away
	err := a.serve(s)

	// A peer that says nothing or hangs up may only have found out whether the port is open.
	portScan := timedOut(err) || errors.Is(plainError(err), errHungUp)
	if !portScan && !errors.Is(err, errStopped) {
		a.lines.logRejected(aboutPeers, addrOf(s.conn.RemoteAddr()), plainError(err))
	}
}

// places are those of the accepted connections of all ports together, which come out of one budget of file
// descriptors. When they are short, the address that has most of them loses one: many connections from one place do
// not keep others out.
type places struct {
	limit int
	mu    sync.Mutex // guards taken
	taken []*session
}

// newPlaces leaves half of the file descriptors for everything else. Go has raised their number as far as it may.
func newPlaces() *places {
	r := syscall.Rlimit{Cur: 2 * maxInbound} // if it cannot be found out
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r)
	return &places{limit: int(min(maxInbound, max(r.Cur/2, 8)))}
}

// take gives s, whose peer is at an address, a place.
func (ps *places) take(s *session, from netip.Addr) {
	bits := from.BitLen()
	if from.Is6() {
		bits = 64
	}
	s.from, _ = from.Prefix(bits)

	ps.mu.Lock()
	defer ps.mu.Unlock()
	if len(ps.taken) >= ps.limit {
		i := slices.Index(ps.taken, ps.leastWanted())
		ps.taken[i].conn.Close()
		ps.taken = slices.Delete(ps.taken, i, i+1)
	}
	ps.taken = append(ps.taken, s)
}

func (ps *places) release(s *session) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if i := slices.Index(ps.taken, s); i >= 0 {
		ps.taken = slices.Delete(ps.taken, i, i+1)
	}
}

// leastWanted returns the session that loses its place when all are taken.
func (ps *places) leastWanted() *session {
	var proven, unproven []*session
	for _, s := range ps.taken {
		if s.proven.Load() {
			proven = append(proven, s)
		} else {
			unproven = append(unproven, s)
		}
	}

	// A quarter is for connections that have not proven anything yet. As few as that lose none: where there is no key,
	// proven connections cost an attacker nothing, and would keep newcomers out.
	candidates := proven
	if len(unproven) > ps.limit/4 {
		candidates = unproven
	}

	// The address that has most loses any of the older half of its places, so that neither patience nor haste pays.
	byAddress := make(map[netip.Prefix][]*session)
	var most []*session
	for _, s := range candidates {
		same := append(byAddress[s.from], s)
		byAddress[s.from] = same
		if len(same) > len(most) {
			most = same
		}
	}
	return most[rand.IntN((len(most)+1)/2)]
}

func addrOf(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// logRejected logs what is wrong with what came from there; nil: nothing is.
func (l *logLimit) logRejected(about string, from netip.Addr, err error) {
	if err != nil {
		l.printf(about, from.String(), levelWarn, "dropped what came from %s: it %v", from, err)
	}
}

// ---- sessions of agents ----

// connect dials to, as dialAgain does, and gives the session until the same deadline; joins: for a join.
func (g *gossip) connect(ctx context.Context, to netip.AddrPort, joins bool, again time.Duration) (net.Conn, error) {
	bound := g.cfg.bind.Addr()
	if joins && !sameFamily(to.Addr(), bound) { // TCP might get there, but no datagram of this node
		return nil, fmt.Errorf("this agent is bound to %s, an address of another kind (-bind [::]:%d takes both)",
			bound, g.cfg.bind.Port())
	}
	deadline := time.Now().Add(sessionTimeout)
	dialer := net.Dialer{KeepAlive: -1, Deadline: deadline}
	if !bound.IsUnspecified() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(bound, 0))
	}
	c, err := dialAgain(ctx, dialer, to, again)
	if err != nil && bound.IsLoopback() && !to.Addr().IsLoopback() {
		return nil, fmt.Errorf("this agent is bound to %s, from where no other machine can be reached "+
			"(-bind sets another address)", bound)
	}
	if err != nil {
		return nil, plainError(err)
	}

	// Where the node may take another address, it is the one from which a dial goes out.
	c.SetDeadline(deadline)
	local := addrOf(c.LocalAddr())
	g.noteLocalAddr(local, true, joins)
	self, _ := g.self()
	onlyLinkLocal := self.Addr.Addr().IsLoopback() && local.Is6() && local.IsLinkLocalUnicast()
	if joins && g.cfg.moves && onlyLinkLocal { // the peer could not answer
		c.Close()
		return nil, errors.New("this machine has only a link-local IPv6 address, which means nothing to others: " +
			"give its interface another one")
	}
	return c, nil
}

// dialAgain dials to, and twice more after the time again. The first result counts.
func dialAgain(ctx context.Context, dialer net.Dialer, to netip.AddrPort, again time.Duration) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	first := make(chan result, 1)
	var decided atomic.Bool
	dial := func() {
		c, err := dialer.DialContext(ctx, "tcp", to.String())
		isFirst := decided.CompareAndSwap(false, true)
		if isFirst {
			first <- result{c, err}
		} else if c != nil {
			c.Close()
		}
	}

	// A lost SYN costs a second in the kernel. What was dialled before goes on: its answer may only be far away.
	for _, after := range []time.Duration{0, again, 2 * again} {
		defer time.AfterFunc(after, dial).Stop()
	}
	r := <-first
	return r.c, r.err
}

// noteLocalAddr is told at which address of this machine a connection stands, which this node has dialled or a peer;
// joins: for a state sync. It follows a change of addresses where the user has not chosen one, and a node that has not
// joined yet learns from it on which network its peers are.
func (g *gossip) noteLocalAddr(local netip.Addr, dialled, joins bool) {
	self, _ := g.self()
	own := self.Addr.Addr()
	bind := g.cfg.bind.Addr()
	if !g.cfg.moves || local == own {
		return
	}

	gone := !isOwnAddress(own)
	if g.cfg.iface != "" {
		ips, _ := addressesOf(g.cfg.iface)
		if slices.Contains(ips, own) {
			return
		}
		local = bestAddress(ips, bind)
		gone = true
	}
	if !isReachable(local, bind) {
		return
	}
	// A peer may come in at a virtual address, which can move to another machine: of the addresses of one kind and
	// interface the node keeps its own.
	settles := joins && (dialled || !onOneInterface(local, own))
	g.postAddress(local, gone, settles)
}

func (g *gossip) postAddress(ip netip.Addr, gone, settles bool) {
	g.post(func(n *node) { n.identity.addressChanged(n, ip, gone, settles, uint64(time.Now().UnixMilli())) })
}

func (g *gossip) isReady() bool {
	select {
	case <-g.ready:
		return true
	default:
		return false
	}
}

// addressKnown is told the address to advertise when it was not known at the start.
func (g *gossip) addressKnown(ip netip.Addr) {
	g.postAddress(ip, true, false)
	close(g.ready)
}

// doFor has the loop run f for a session, unless it has ended; an error of f ends it.
func (g *gossip) doFor(s *session, f func(*node) error) {
	if s.err == nil {
		s.err = g.run(f)
	}
}

// openSession opens a session with a first frame of kind k, and takes the handshake reply: the peer's header, and what
// it believes about this node.
func (g *gossip) openSession(c net.Conn, k msgKind) (s *session, w header, about []update) {
	s = g.acceptor.sealer.Load().handshake(&session{conn: c, dialled: true})
	var hdr header
	g.doFor(s, func(n *node) error { hdr = n.header(k); return nil })
	s.send(&hdr)
	about = s.receive(&w)
	if s.err == nil && (w.Kind != msgHandshakeReply || validName(w.From) != nil) {
		s.err = errMalformed
	}
	if s.err == nil {
		g.post(func(n *node) { n.noteSessionRoundTrip(w.From, w.instance(), s.roundTrip) })
	}
	return s, w, about
}

// tcpProbeTimes returns how long a TCP probe may take, which is three round trips and what is lost, and when it dials
// anew.
func tcpProbeTimes(roundTrip time.Duration) (limit, again time.Duration) {
	return max(probeTimeout, 5*roundTrip), max(150*ms, 2*roundTrip)
}

// tcpProbe probes a member by TCP, and tells the node what comes of it.
func (g *gossip) tcpProbe(m Member, roundTrip time.Duration) {
	limit, again := tcpProbeTimes(roundTrip)
	ctx, cancel := context.WithTimeout(g.acceptor.ctx, limit)
	defer cancel()
	tell := func(v verdict, w header) { g.post(func(n *node) { n.detector.handleTCPProbeResult(n, m, v, w) }) }

	// A probe that is cut off tries again: the listener of a dying process accepts until the kernel has come to it, which
	// resets the last connections, and then refuses.
	for range 4 {
		c, err := g.connect(ctx, m.Addr, false, again) // ctx ends it
		if errors.Is(err, syscall.ECONNREFUSED) {
			tell(verdictRefused, header{})
		}
		if err != nil {
			return
		}

		tell(verdictSilent, header{})
		defer context.AfterFunc(ctx, func() { c.Close() })()
		s, w, _ := g.openSession(c, msgTCPProbe)
		c.Close()
		if s.err == nil {
			tell(verdictAlive, w)
			return
		}
		if ctx.Err() != nil {
			return // it accepts and is silent
		}
		tell(verdictNone, header{})
	}
}

// relink makes links the watch links that stand, and ends all others a little later.
func (g *gossip) relink(self Member, links []Member) {
	old := g.state.links
	g.state.links = make(map[string]context.CancelFunc)
	for _, m := range links {
		key := fmt.Sprint(self.Instance, m.Instance, m.Name)
		end := old[key]
		if end == nil {
			ctx, cancel := context.WithCancel(g.acceptor.ctx)
			roundTrip := g.state.node.roundTripTo(m)
			g.acceptor.wg.Go(func() { g.keepLink(ctx, m, roundTrip) })
			end = cancel
		}
		g.state.links[key] = end
		delete(old, key)
	}

	// There is to be no moment without a link.
	for _, end := range old {
		time.AfterFunc(linkOverlap, end)
	}
}

// keepLink holds a watch link to m until ctx is done.
func (g *gossip) keepLink(ctx context.Context, m Member, roundTrip time.Duration) {
	for tries := 1; ctx.Err() == nil; tries++ {
		err := g.linkOnce(ctx, m, roundTrip)
		if err == nil {
			tries = 0
		}
		if ctx.Err() == nil {
			g.post(func(n *node) { n.detector.linkEnded(n, m, tries) })
		}

		// Where no link can be had it is tried more and more rarely: each failure starts a probe, and a firewall stays.
		pause := min(time.Second<<min(max(tries-1, 0), 10), maxLinkWait)
		wait, cancel := context.WithTimeout(ctx, pause)
		<-wait.Done()
		cancel()
	}
}

// redialAfter returns when a session that is more than a probe dials anew.
func redialAfter(roundTrip time.Duration) time.Duration { return max(300*ms, 2*roundTrip) }

// linkOnce returns nil when a link has ended, or why none could be had.
func (g *gossip) linkOnce(ctx context.Context, m Member, roundTrip time.Duration) error {
	c, err := g.connect(ctx, m.Addr, false, redialAfter(roundTrip))
	if err != nil {
		return err
	}
	defer c.Close()
	s, w, _ := g.openSession(c, msgLink)
	isOther := w.From != m.Name || w.instance() != m.Instance
	if s.err != nil || isOther { // another instance answers there: this one has ended
		return s.err
	}

	c.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now()) })()
	s.receive(&header{})
	if ctx.Err() != nil && g.acceptor.ctx.Err() == nil {
		s.err = nil
		s.send(&header{Kind: msgBye}) // nothing has failed
	}
	return nil
}

// syncWith syncs with the peer at the address of sync.peer, which it fills.
func (g *gossip) syncWith(sync *stateSync) error {
	c, err := g.connect(g.acceptor.ctx, sync.peer.Addr, sync.joins, redialAfter(sync.roundTrip))
	if err != nil {
		return err
	}
	defer c.Close()
	s, w, about := g.openSession(c, msgSync)
	sync.roundTrip = s.roundTrip

	differ := false
	g.doFor(s, func(n *node) error {
		differ = w.Digest != n.digest()
		return n.handleWelcome(sync, w, about)
	})

	if differ {
		defer s.endAfter(syncTimeout).Stop()
		g.sendTable(s, sync)
		g.receiveTable(s, sync)
		g.sendTable(s, sync) // the events that only this side has
	}
	g.doFor(s, func(n *node) error { n.syncDone(sync); return nil })
	return plainError(s.err)
}

// sendTable sends the table, and receiveTable receives one. A session calls on the loop only when it is its turn, and
// has no turn while it waits for its peer: slow peers delay no other session, and fast ones leave the loop its time.
func (g *gossip) sendTable(s *session, sync *stateSync) {
	for more := true; more && s.err == nil; {
		var frame []byte
		g.turns <- struct{}{}
		g.doFor(s, func(n *node) error { frame, more = n.tableChunk(sync); return nil })
		<-g.turns
		s.sendBytes(frame)
	}
}

func (g *gossip) receiveTable(s *session, sync *stateSync) {
	for more := true; more && s.err == nil; {
		s.conn.SetReadDeadline(time.Now().Add(frameTimeout))
		sealed := s.readFrame()

		var hdr header
		bad := 0
		g.turns <- struct{}{}
		us := s.decode(sealed, &hdr)
		g.doFor(s, func(n *node) (err error) {
			more, bad, err = n.mergeChunk(sync, hdr, us)
			return err
		})
		<-g.turns
		if bad > 0 {
			g.lines.logRejected(aboutPeers, addrOf(s.conn.RemoteAddr()), fmt.Errorf("sent %d bad records in a table", bad))
		}
	}
}

// serve answers one agent that has dialled.
func (g *gossip) serve(s *session) error {
	if !g.isReady() {
		return errHungUp // a peer must not learn an address that is only a stopgap
	}
	var hdr header
	s.receive(&hdr)
	if s.err != nil {
		return s.err
	}
	if hdr.Kind > msgBye {
		return nil // of a later version
	}
	opensSession := hdr.Kind >= msgTCPProbe && hdr.Kind <= msgSync
	if !opensSession || validName(hdr.From) != nil {
		return errMalformed
	}

	g.noteLocalAddr(addrOf(s.conn.LocalAddr()), false, hdr.Kind == msgSync)
	var reply header
	var about []update
	g.doFor(s, func(n *node) error { reply, about = n.handshakeReply(hdr); return nil })
	s.send(&reply, about...)

	from := Member{Name: hdr.From, Instance: hdr.instance()}
	switch hdr.Kind {
	case msgLink:
		return g.holdLink(s, from)
	case msgSync: // a peer that hangs up now has the same table
		defer s.endAfter(syncTimeout).Stop()
		sync := &stateSync{peer: from, from: addrOf(s.conn.RemoteAddr()), digest: hdr.Digest}
		g.receiveTable(s, sync)
		g.sendTable(s, sync)
		g.receiveTable(s, sync)
	}
	return s.err
}

// holdLink holds a link that m has dialled while m is a member.
func (g *gossip) holdLink(s *session, m Member) error {
	// The link of a vanished host would stay for ever, so it is looked at every now and then.
	for wait := helloTimeout; s.err == nil; wait = maxLinkWait {
		s.conn.SetReadDeadline(time.Now().Add(wait))
		s.receive(&header{})
		if s.err == nil {
			return nil // a bye
		}

		quiet := timedOut(s.err)
		s.err = g.run(func(n *node) error {
			if quiet && !n.table.ended(m) {
				return nil
			}
			n.detector.linkEnded(n, m, 0) // no news about an instance that has ended
			return errHungUp
		})
	}
	return s.err
}

// join tries each of seeds once, all at the same time, and returns what came of them together.
func (g *gossip) join(seeds []string, replay bool) (all seedResult) {
	results := make(chan seedResult, len(seeds))
	for _, seed := range seeds {
		asked := stateSync{joins: true, byCommand: true, replay: replay}
		g.acceptor.wg.Go(func() { results <- g.joinSeed(seed, asked) })
	}
	for range seeds {
		r := <-results
		all.names = append(all.names, r.names...)
		all.errs = append(all.errs, r.errs...)
		all.isSelf = all.isSelf || r.isSelf
	}
	return all
}

// joinSeed syncs with every address of a seed, as the given sync says, with each as soon as it is known.
func (g *gossip) joinSeed(seed string, as stateSync) (r seedResult) {
	ctx, cancel := context.WithCancel(g.acceptor.ctx)
	defer cancel()
	select {
	case <-g.ready: // until then there is no address to tell the peer
	case <-ctx.Done():
		return r
	}

	var mu sync.Mutex // guards r
	var tries sync.WaitGroup
	var failed error
	lookups := lookUp(ctx, seed, defaultPort)
	for range cap(lookups) {
		l := <-lookups
		if l.err != nil {
			failed = l.err
		}
		for _, at := range l.addrs[:min(len(l.addrs), maxDials)] {
			tries.Go(func() {
				sync := as
				sync.peer.Addr = at
				err := g.syncWith(&sync)
				mu.Lock()
				defer mu.Unlock()
				r.add(sync.peer, err)
				if r.answered() {
					cancel() // one address that answers is enough: no look-up is waited for
				}
			})
		}
	}
	tries.Wait()

	if !r.answered() && len(r.errs) == 0 { // a name with an A record needs no AAAA
		r.errs = []string{fmt.Sprintf("%s: %v", seed, failed)}
	}
	return r
}

// add takes what came of a sync with a peer at one address of the seed.
func (r *seedResult) add(peer Member, err error) {
	if err == nil {
		r.names = append(r.names, peer.Name)
		r.errs = nil // one address is enough
		return
	}

	if len(r.names) == 0 {
		r.errs = append(r.errs, fmt.Sprintf("%s: %v", peer.Addr, err))
	}
	if errors.Is(err, errSelf) {
		r.isSelf = true
	}
	if errors.Is(err, errNameTaken) || errors.Is(err, errNameHeld) {
		r.taken = err
	}
}

// answered reports whether it is known what is at the seed.
func (r *seedResult) answered() bool { return len(r.names) > 0 || r.isSelf || r.taken != nil }

// ---- sessions of commands ----

// rpcRequest is what a command asks of its agent. Flat: a slice or a map could claim more than it brings.
type rpcRequest struct {
	Op                      string // members, join, leave, force-leave, event, tags, query, watch or info
	Name                    string
	Payload                 []byte
	Args, DeleteTags        string // both separated by NUL
	More                    bool   // the next request brings more of Args
	Prune, Replay, Coalesce bool
	Timeout                 time.Duration
}

// rpcResponse is one frame of what an agent says to a command; updates may follow.
type rpcResponse struct {
	Error   string
	More    bool   // it is not the last
	Count   int    // join: how many answered
	Text    string // separated by NUL
	Kind    eventKind
	Reply   reply
	At      int64 // Unix nanoseconds of the event
	Dropped int   // events before this one that the reader was too slow for
}

// sendRequest sends a request, whose arguments may take several frames.
func (s *session) sendRequest(req rpcRequest) error {
	args := req.Args
	for {
		req.Args = args[:min(len(args), textPage)]
		args = args[len(req.Args):]
		req.More = args != ""
		frame := wire.encode(nil, &req)
		if len(frame) > maxFrame {
			return failf("", "the request takes %d bytes, the limit is %d", len(frame), maxFrame)
		}
		s.sendBytes(frame)

		if !req.More {
			return nil
		}
		req = rpcRequest{} // the next frames bring arguments alone
	}
}

// receiveRequest receives a request: at most the names of all members that a cluster may have.
func (s *session) receiveRequest() (req rpcRequest) {
	s.receive(&req)
	args := []byte(req.Args)
	for more := req.More; more && s.err == nil; {
		var part rpcRequest
		s.receive(&part)
		args = append(args, part.Args...)
		more = part.More
		if len(args) > maxMembers*(maxName+1) || part.Args == "" {
			s.err = errMalformed
		}
	}
	req.Args = string(args)
	return req
}

// unreachable returns why there was no answer.
func unreachable(addr string, timeout time.Duration, err error) error {
	where := "-rpc-addr is the agent's RPC address (default " + defaultRPC + ")"
	switch {
	case errors.Is(err, errGossip):
		return failf(where, "%s %v", addr, err)
	case errors.Is(err, errForeign):
		return failf(where, "what listens at %s is not the RPC of a hamlet agent", addr)
	case errors.Is(err, errVersion):
		return failf("this is hamlet "+version, "the agent at %s %v", addr, err)
	case errors.Is(err, errKeyless):
		return failf("give it with -rpc-auth or SERF_RPC_AUTH", "the agent at %s wants a token", addr)
	case errors.Is(err, errKeyed):
		return failf("leave out -rpc-auth and SERF_RPC_AUTH", "the agent at %s has no token", addr)
	case errors.Is(err, errOtherKey):
		return failf("-rpc-auth or SERF_RPC_AUTH must be what the agent was started with",
			"the agent at %s wants another token", addr)
	}

	// All else may be better in a moment.
	msg := fmt.Sprintf("no agent answers at %s: %v", addr, plainError(err))
	hint := fmt.Sprintf("is the agent running? start it with '%s agent', or say where it is with -rpc-addr or "+
		"SERF_RPC_ADDR", prog)
	if timedOut(err) {
		msg = fmt.Sprintf("the agent at %s did not answer within %v", addr, timeout.Round(ms))
		hint = "it may be stopped or overloaded: look at its process and its log"
	}
	return &failure{msg: msg, hint: hint, code: 1, retriable: true}
}

// rpcSealer returns the sealer of a token, which is a key: it never travels.
func rpcSealer(token string, gossip uint16) *sealer {
	d := &sealer{cluster: "RPC", portKind: rpcPort, otherPort: gossip}
	if token != "" {
		key := sha256.Sum256([]byte(token))
		d.keys = [][]byte{key[:]}
	}
	return d
}

// serveRPC answers commands at ln; info is what the agent knows of itself.
func serveRPC(ln net.Listener, g *gossip, token string, info func() []string) *acceptor {
	self, _ := g.self()
	a := &acceptor{tcp: ln, places: g.acceptor.places, lines: g.lines}
	a.serve = func(s *session) error { return g.command(s, ln, info) }
	a.sealer.Store(rpcSealer(token, self.Addr.Port()))
	a.ctx, a.quit = context.WithCancel(context.Background())
	a.wg.Go(a.accept)
	return a
}

func (g *gossip) command(s *session, ln net.Listener, info func() []string) (err error) {
	req := s.receiveRequest()
	if s.err != nil {
		return fmt.Errorf("came to the RPC, and %w", s.err)
	}

	s.conn.SetDeadline(time.Time{})
	var last rpcResponse
	switch req.Op {
	case "members":
		g.list(s)
	case "join":
		err = g.joinCommand(s, req, &last)
	case "leave":
		g.cfg.log.printf(levelInfo, "told to leave the cluster")
		ln.Close() // the next agent may be started as soon as the answer is read
		err = g.leave()
	case "force-leave":
		err = g.run(func(n *node) error { return n.forceLeave(req.Name, req.Prune) })
	case "event":
		err = g.userEvent(req)
	case "tags":
		set := Tags(req.Args).asMap()
		err = g.run(func(n *node) error { return n.identity.setTags(n, set, splitNUL(req.DeleteTags)) })
	case "info":
		s.sendTexts(info(), 3) // group, key, value
	case "query":
		err = g.streamQuery(s, req)
	case "watch":
		sub := g.feed.subscribe(0) // before the list, so that no change is missed between list and stream
		s.patient = true
		g.list(s)
		g.stream(s, sub)
	default:
		err = fmt.Errorf("this agent does not know the request %q", req.Op)
	}

	if err != nil {
		last.Error = err.Error()
	}
	s.send(&last)
	return s.err
}

// joinCommand joins, for as long as the resolver and the peers take.
func (g *gossip) joinCommand(s *session, req rpcRequest, resp *rpcResponse) error {
	if !g.isReady() {
		return fmt.Errorf("cannot join yet: %s", g.cfg.awaits)
	}
	s.send(&rpcResponse{More: true}) // it may take longer than the command waits for an agent that is stopped
	r := g.join(splitNUL(req.Args), req.Replay)
	resp.Count = len(r.names)

	// An address of this node itself counts as one that was contacted, as in Serf: start scripts run the same join on
	// every node.
	if r.isSelf {
		resp.Count++
		resp.Text = strings.Join(r.errs, "; ")
	}
	if resp.Count == 0 {
		return errors.New(strings.Join(r.errs, "; "))
	}
	return nil
}

// streamQuery asks members, and sends their names and then what they answer.
func (g *gossip) streamQuery(s *session, req rpcRequest) error {
	var sub *subscriber
	var asked []string
	err := g.run(func(n *node) (err error) {
		var id uint32
		id, asked, err = n.queries.ask(n, req.Name, req.Payload, splitNUL(req.Args), req.Timeout)
		if err == nil {
			sub = g.feed.subscribe(id)
		}
		return err
	})
	if err != nil {
		return err
	}

	s.sendTexts(asked, 1)
	g.stream(s, sub)
	return nil
}

// sendTexts sends texts in frames of some KiB. Each count of them belong together, and stay in one frame.
func (s *session) sendTexts(texts []string, count int) {
	var page []byte // each text with a NUL in front
	for group := range slices.Chunk(texts, count) {
		for _, text := range group {
			if len(text) > textPage {
				text = text[:textPage] + "..."
			}
			page = append(page, 0)
			page = append(page, strings.ReplaceAll(text, "\x00", "")...)
		}

		if len(page) > textPage {
			s.send(&rpcResponse{More: true, Text: string(page[1:])})
			page = nil
		}
	}
	s.send(&rpcResponse{More: true, Text: strings.TrimPrefix(string(page), "\x00")})
}

// userEvent sends a user event, as soon as the members have caught up with those that were sent before.
func (g *gossip) userEvent(req rpcRequest) error {
	deadline := time.Now().Add(eventPatience)
	for {
		err := g.run(func(n *node) error { return n.userEvent(req.Name, req.Payload, req.Coalesce) })
		if !errors.Is(err, errEventsWait) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the event was not sent: %w within %v", err, eventPatience)
		}
		time.Sleep(2 * ms)
	}
}

// list sends all members.
func (g *gossip) list(s *session) {
	// A reader that does not read costs a page, however many they are.
	after := ""
	for more := true; more && s.err == nil; {
		var us []update
		g.doFor(s, func(n *node) error {
			for _, m := range n.members(after, pageSize) {
				since := n.table.get(m.Name).since
				us = append(us, update{Member: m, Age: uint64((n.now - since) / ms)})
				after = m.Name
			}
			return nil
		})
		s.send(&rpcResponse{More: true, At: time.Now().UnixNano()}, us...)
		more = len(us) == pageSize
	}
}

// stream sends what sub reads until the reader or the agent has gone, or the query has ended.
func (g *gossip) stream(s *session, sub *subscriber) {
	unsubscribe := func() { g.feed.unsubscribe(sub) }
	defer unsubscribe()
	defer context.AfterFunc(g.acceptor.ctx, unsubscribe)()
	go func() {
		io.Copy(io.Discard, s.conn) // until the reader has gone
		unsubscribe()
	}()

	for d := range sub.waiting {
		isEnd := d.ev.kind == eventAnswer && d.ev.reply == replyNone
		if isEnd || s.err != nil {
			return
		}
		resp := rpcResponse{More: true, Kind: d.ev.kind, Reply: d.ev.reply, Text: d.ev.changed}
		resp.Dropped = int(sub.dropped.Swap(0))
		resp.At = d.at.UnixNano()
		s.send(&resp, d.ev.update)
	}
}

// ---- the RPC's client ----

// client is how a command reaches its agent.
type client struct {
	addr  string // of the agent's RPC
	token string
}

// call asks the agent and calls each with each response, until it returns an error (io.EOF: it has enough).
func (c *client) call(req rpcRequest, timeout time.Duration, each func(rpcResponse, []update) error) error {
	deadline := time.Now().Add(timeout)
	addr, err := rpcAddr(c.addr)
	if err != nil {
		return err
	}
	conn, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return unreachable(addr, timeout, err)
	}
	defer conn.Close()
	conn.SetDeadline(deadline)
	s := rpcSealer(c.token, 0).handshake(&session{conn: conn, dialled: true})
	if err := s.sendRequest(req); err != nil {
		return err
	}

	for count := 0; count < maxResponses || req.Op == "watch"; count++ {
		var resp rpcResponse
		us := s.receive(&resp)
		if s.err != nil {
			return unreachable(addr, timeout, s.err)
		}
		if resp.Error != "" {
			return failf("", "%s", resp.Error)
		}
		err := each(resp, us)
		if err == io.EOF {
			return nil
		}
		if err != nil || !resp.More {
			return err
		}

		// The first response, and but for a stream all of them, must come within timeout.
		switch req.Op {
		case "watch", "join":
			conn.SetReadDeadline(time.Time{})
		case "query":
			conn.SetReadDeadline(deadline.Add(req.Timeout))
		}
	}
	return failf("", "the agent at %s sent more than a cluster can have", addr)
}

// tell has the agent do something, and then prints that it is done.
func (c *client) tell(req rpcRequest, timeout time.Duration, done string) error {
	return c.call(req, timeout, func(rpcResponse, []update) error { return output(done) })
}

// members asks for all members, and chooses those that match filter.
func (c *client) members(filter memberFilter, timeout time.Duration) (members []memberStatus, err error) {
	err = c.call(rpcRequest{Op: "members"}, timeout, func(_ rpcResponse, us []update) error {
		for _, u := range us {
			if filter.matches(u.Member) {
				age := min(u.Age, uint64(math.MaxInt64/ms)) // milliseconds
				members = append(members, memberStatus{u.Member, time.Duration(age) * ms})
			}
		}
		return nil
	})
	slices.SortStableFunc(members, func(a, b memberStatus) int { return compareNames(a.Name, b.Name) })
	return members, err
}

// waitForMembers asks for the members that match filter until wait of them are alive, or timeout (0: none) is over.
func (c *client) waitForMembers(filter memberFilter, wait int, timeout time.Duration) ([]memberStatus, error) {
	const pause = 100 * ms
	if timeout == 0 {
		timeout = math.MaxInt64
	}
	deadline := time.Now().Add(timeout)
	for {
		members, err := c.members(filter, min(rpcTimeout, max(time.Until(deadline), pause)))
		living := aliveNames(members)
		if err == nil && len(living) >= wait {
			return members, nil
		}

		f, _ := errors.AsType[*failure](err)
		mayStart := f != nil && f.retriable
		if wait == 0 || err != nil && !mayStart {
			return nil, err
		}
		if err == nil {
			names := "none"
			if len(living) > 0 {
				names = strings.Join(living, ", ")
			}
			err = failf("", "%d of %d members alive after %v: %s", len(living), wait, timeout, names)
		}
		if time.Until(deadline) <= pause {
			return nil, err
		}
		time.Sleep(pause)
	}
}

// query asks the members that nodes and filter name (with neither, all of them), and shows each result as it comes.
func (c *client) query(
	req rpcRequest, nodes []string, filter memberFilter, result *queryResult, show func(string) error,
) error {
	dispatched := fmt.Sprintf("Query '%s' dispatched\n", req.Name)
	if len(filter) > 0 {
		members, err := c.members(filter, rpcTimeout)
		if err != nil {
			return err
		}
		living := aliveNames(members)
		if len(nodes) > 0 {
			living = slices.DeleteFunc(living, func(name string) bool { return !slices.Contains(nodes, name) })
		}
		if len(living) == 0 {
			return show(dispatched) // no member matches, so no answer is missing
		}
		nodes = living
	}

	result.ask(nodes) // a member that was named and is not there does not answer
	req.Args = strings.Join(nodes, "\x00")
	return c.call(req, rpcTimeout, func(a rpcResponse, us []update) error {
		text := ""
		if a.Text != "" { // whom the agent has asked: it has sent the query
			text = dispatched
			dispatched = ""
		}
		result.ask(splitNUL(a.Text))
		for _, u := range us {
			text += result.add(u.Member.Name, a.Reply, string(u.Payload))
		}
		return show(text)
	})
}

// ---- addresses to dial and to listen on ----

// hostPort splits HOST, HOST:PORT, IP, [IPv6] or [IPv6]:PORT; port stands in for a missing one.
func hostPort(s, port string) (string, string, error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, port, nil
	}
	h, p, err := net.SplitHostPort(s)
	if err != nil {
		h, p, err = net.SplitHostPort(s + ":" + port)
	}
	_, notNumber := strconv.ParseUint(p, 10, 16)
	if err != nil || notNumber != nil || !isHost(h) {
		return "", "", fmt.Errorf("%q is not an address", s)
	}
	return h, p, nil
}

// isHost reports whether s can be a host: what looks like an option or a URL cannot.
func isHost(s string) bool {
	odd := func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(" /@[]", r) }
	return !strings.HasPrefix(s, "-") && !strings.ContainsFunc(s, odd)
}

func checkAddrs(addrs []string) error {
	for _, s := range addrs {
		host, port, err := hostPort(s, defaultPort)
		if err != nil || host == "" || port == "0" {
			return fmt.Errorf("%q is not HOST or HOST:PORT, such as 10.0.2.15:7946 or [2001:db8::7]:7946", s)
		}
	}
	return nil
}

func rpcAddr(s string) (string, error) {
	host, port, err := hostPort(s, defaultRPCPort)
	if err != nil {
		err = usagef("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	return net.JoinHostPort(host, port), err
}

type lookup struct {
	addrs []netip.AddrPort
	err   error
}

// lookUp looks up HOST[:PORT]; port stands in for a missing one. A and AAAA records are asked for separately, and each
// of the two results comes as soon as it is there. The resolver may take as long as it likes: only ctx ends it.
func lookUp(ctx context.Context, s, port string) <-chan lookup {
	results := make(chan lookup, 2)
	for _, network := range []string{"ip4", "ip6"} {
		go func() { results <- lookUpFamily(ctx, network, s, port) }()
	}
	return results
}

// lookUpFamily looks up the addresses of one family.
func lookUpFamily(ctx context.Context, network, s, port string) (l lookup) {
	host, port, err := hostPort(s, port)
	if err != nil {
		return lookup{err: err}
	}
	ip, err := netip.ParseAddr(host)
	isOther := ip.Is4() != (network == "ip4")
	if err == nil && isOther {
		return lookup{}
	}
	ips := []netip.Addr{ip}
	if err != nil {
		ips, err = net.DefaultResolver.LookupNetIP(ctx, network, host)
		l.err = lookupError(err)
	}
	for _, ip := range ips {
		l.addrs = append(l.addrs, netip.MustParseAddrPort(net.JoinHostPort(ip.Unmap().String(), port)))
	}
	return l
}

// lookUpOne returns an address of s that fits, an IPv4 one where there is a choice. The error says that s has none.
func lookUpOne(
	ctx context.Context, s, port string, fits func(netip.Addr) bool,
) (best netip.AddrPort, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = errors.New("it has no address that this agent can use")
	results := lookUp(ctx, s, port)
	for range cap(results) {
		l := <-results
		if l.err != nil {
			err = l.err
		}
		for _, found := range l.addrs {
			better := !best.IsValid() || found.Addr().Is4() && !best.Addr().Is4()
			if better && fits(found.Addr()) {
				best = found
			}
		}
		if best.Addr().Is4() {
			break
		}
	}
	if best.IsValid() {
		return best, nil
	}
	return best, err
}

// lookupError returns in plain words why a name has no address.
func lookupError(err error) error {
	dns, isDNS := errors.AsType[*net.DNSError](err)
	if !isDNS {
		return err
	}
	if dns.IsNotFound || dns.Server == "" {
		return errors.New(dns.Err) // such as "no such host"
	}
	return fmt.Errorf("no usable answer from the name server %s", dns.Server)
}

// sourceTo asks the kernel where packets to ip would come from. Nothing is sent.
func sourceTo(ip netip.Addr) netip.Addr {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 9)))
	if err != nil {
		return netip.Addr{}
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}

// addressesOf returns the addresses of an interface; of all for "".
func addressesOf(iface string) ([]netip.Addr, error) {
	list := net.InterfaceAddrs
	if iface != "" {
		ifc, err := net.InterfaceByName(iface)
		if err != nil {
			return nil, err
		}
		list = ifc.Addrs
	}
	addrs, err := list()
	return ipsOf(addrs), err
}

// ipsOf drops the length of their network from addresses of interfaces.
func ipsOf(addrs []net.Addr) (ips []netip.Addr) {
	for _, a := range addrs {
		prefix, _ := netip.ParsePrefix(a.String())
		ips = append(ips, prefix.Addr().Unmap())
	}
	return ips
}

// bestAddress returns the address among ips to tell others; the zero one if there is none.
func bestAddress(ips []netip.Addr, bind netip.Addr) (best netip.Addr) {
	for _, ip := range ips {
		if usable(ip, bind) {
			return ip
		}
		if !best.IsValid() && isReachable(ip, bind) {
			best = ip
		}
	}
	return best
}

// onOneInterface reports whether both are addresses of one kind and of the same interface.
func onOneInterface(x, y netip.Addr) bool {
	ifcs, _ := net.Interfaces()
	for _, ifc := range ifcs {
		ips, _ := addressesOf(ifc.Name)
		if slices.Contains(ips, x) && slices.Contains(ips, y) {
			return x.Is4() == y.Is4()
		}
	}
	return false
}

// isOwnAddress reports whether others can reach this machine at ip, as far as it knows.
func isOwnAddress(ip netip.Addr) bool {
	ips, err := addressesOf("")
	return err != nil || !ip.IsLoopback() && slices.Contains(ips, ip)
}

// usable reports whether other machines may reach ip at a socket bound to bind.
func usable(ip, bind netip.Addr) bool {
	return ip.IsGlobalUnicast() && ip.Zone() == "" && sameFamily(ip, bind)
}

// isReachable reports whether the machines of some network may reach ip at a socket bound to bind: it is usable, or
// a link-local address of IPv4. One of IPv6 is of use only with the name of an interface, which other machines do not
// share.
func isReachable(ip, bind netip.Addr) bool {
	return usable(ip, bind) || ip.Is4() && ip.IsLinkLocalUnicast() && sameFamily(ip, bind)
}

// sameFamily reports whether a socket bound to bind takes packets of ip's family.
func sameFamily(ip, bind netip.Addr) bool {
	return ip.Is4() == bind.Is4() || bind == netip.IPv6Unspecified()
}

// family ends the name of the network for a socket bound to ip: as "4", or 0.0.0.0 would take IPv6 as well.
func family(ip netip.Addr) string {
	if ip.Is4() {
		return "4"
	}
	return ""
}
