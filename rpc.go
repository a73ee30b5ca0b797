// rpc.go: all that is said over TCP.
//
// Here are the handshake, the bound on inbound connections, the sessions of agents (probe, link, sync), and those of
// commands. Both speak one dialect: a hello each way with a challenge, then frames, each sealed and bound to both
// challenges, its direction and its count. A session is straight blocking code in a goroutine; it posts what it learns
// to the loop, and asks the loop for what it shall say. What a claim means is not known here.

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxInbound      = 512              // accepted connections at a time, of agents
	maxRPCConns     = 256              // and of commands
	maxSyncs        = 16               // exchanges that others have dialled, at a time
	maxDials        = 64               // addresses tried in one join
	maxWatchQueue   = 4096             // events that wait for a slow watcher
	pageSize        = 40               // members in a frame
	factsPage       = 8 << 10          // bytes of facts in a frame, about; of one fact, at most
	helloTimeout    = 2 * time.Second  // for a stranger's hello
	frameTimeout    = 5 * time.Second  // for any frame: the first one takes a round trip
	sessionTimeout  = 10 * time.Second // until the other side of a session has answered: three round trips, and what TCP sends again
	maxLinkWait     = 30 * time.Second // between tries to have a link, and looks whether its member is still one
	eventPatience   = 4 * time.Second  // for so long an event waits for its turn: less than its command waits
	syncSlotTimeout = time.Second      // until a place for an exchange must be free
	windowSize      = 64
)

// ---- the handshake, and frames ----

// What is wrong with who is at the other end, as seen from this one.
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
	errSerfRPC  = errors.New("speaks the RPC of Serf, which this agent does not: see 'watch -format json' and the other commands")
	errSilent   = fmt.Errorf("hung up without a word: it %w (a Serf agent hangs up so)", errForeign)
	errHungUp   = errors.New("closed the connection")
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
	return append(b, rand.Text()[:16]...) // 80 bits
}

// checkHello says what is wrong with the hello of the other side.
func (d *sealer) checkHello(b []byte, dialled bool) error {
	switch is := b[len(helloLine):]; {
	case string(b[:len(helloLine)]) != helloLine:
		return checkProtocol(max(b[7]-'0', 4)) // HAMLET/N; that of protocol 4 was HAMLET/3
	case checkProtocol(is[8]) != nil:
		return checkProtocol(is[8])
	case is[0] != d.portKind && !dialled:
		return errors.New("looks for the other port of this agent")
	case is[0] != d.portKind && d.portKind == gossipPort:
		return fmt.Errorf("%w, which gossips on port %d: join that one", errRPC, binary.BigEndian.Uint16(is[2:]))
	case is[0] != d.portKind:
		return fmt.Errorf("%w, whose RPC is on port %d", errGossip, binary.BigEndian.Uint16(is[2:]))
	case !bytes.Equal(is[4:8], d.receiverHash("")):
		return errCluster
	case is[1] == helloKeyed && len(d.keys) == 0:
		return errKeyless
	case is[1] == helloInClear && !d.opensInClear():
		return errKeyed
	}
	return nil
}

// session is a connection whose both sides have said hello. A frame is its length and its sealed body. That
// it opens proves that the other side has the key and answers this challenge, and that no frame is missing
// before it. After the first error, err, nothing is sent or read any more.
type session struct {
	net.Conn
	proven         atomic.Bool // a frame has opened
	gone           atomic.Bool // it is over, for the one who has accepted it
	sealer         *sealer
	hellos         string // both challenges
	dialled        bool
	patient        bool          // its reader may pause for as long as it likes
	roundTrip      time.Duration // that of the hellos, for the one who has dialled
	sent, received uint64
	err            error
}

// handshake exchanges hellos: the dialler's comes first. Whoever has not answered a challenge gets nothing else.
// What cannot be written is noticed by the next that is read.
func (d *sealer) handshake(s *session) *session {
	mine, theirs := d.hello(), make([]byte, helloSize)
	start := time.Now()
	if s.dialled {
		s.Write(mine)
	}
	n, err := io.ReadFull(s, theirs)
	s.roundTrip = time.Since(start)
	switch {
	case n > 0 && bytes.Contains(theirs[:n], []byte("Command")): // msgpack: {"Command": "handshake", ...}
		s.err = errSerfRPC
	case n > 0 && !bytes.HasPrefix(theirs, []byte(helloLine[:7])):
		s.err = fmt.Errorf("%w (it says %.8q): is this the right port?", errForeign, theirs[:n])
	case n == 0 && s.dialled && !timedOut(err):
		s.err = errSilent
	case err != nil:
		s.err = err
	case s.dialled:
		s.err, s.hellos = d.checkHello(theirs, true), string(mine)+string(theirs)
	default:
		s.Write(mine)
		s.err, s.hellos = d.checkHello(theirs, false), string(theirs)+string(mine)
	}
	s.sealer = d
	return s
}

// send sends one frame: a message, and what may follow it.
func (s *session) send(message any, us ...update) { s.sendBytes(wire.encode(nil, message, us...)) }

func (s *session) sendBytes(data []byte) {
	if s.err != nil {
		return
	}
	b := s.sealer.seal(make([]byte, 4, 64+len(data)), data, fmt.Sprint("frame ", s.dialled, s.sent, s.hellos))
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	s.sent++
	if !s.patient {
		s.SetWriteDeadline(time.Now().Add(frameTimeout))
	}
	_, s.err = s.Write(b)
}

// receive reads one frame until the deadline that is set: a message, and what may follow it. A length of 0 says
// that the other side could not open the first one.
func (s *session) receive(message any) (us []update) {
	var size [4]byte
	if s.err == nil {
		_, s.err = io.ReadFull(s, size[:])
	}
	var b []byte
	switch n := binary.BigEndian.Uint32(size[:]); {
	case s.err != nil:
	case n == 0:
		s.err = errOtherKey
	case n > maxFrame+1024:
		s.err = fmt.Errorf("sent a frame of %d bytes, the limit is %d", n, maxFrame)
	default:
		b = make([]byte, n)
		_, s.err = io.ReadFull(s, b)
	}
	if s.err != nil {
		return nil
	}
	b, s.err = s.sealer.open(b, fmt.Sprint("frame ", !s.dialled, s.received, s.hellos))
	if s.received++; s.err != nil && !s.dialled {
		s.Write(make([]byte, 4))
	}
	if s.err == nil {
		s.proven.Store(true)
		if b, s.err = wire.decode(b, message); s.err == nil {
			us, s.err = wire.decodeAll(b)
		}
	}
	return us
}

func timedOut(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// plainError says in plain words how a session has ended.
func plainError(err error) error {
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed):
		return errHungUp
	case timedOut(err) || errors.Is(err, context.Canceled):
		return fmt.Errorf("no answer within %v", sessionTimeout)
	}
	return reason(err)
}

// ---- who may come in ----

// acceptor are those who come in at a port, and all that is under way there. When there are too many connections,
// the oldest that has proven nothing goes, so that strangers who hold connections open keep nobody out.
type acceptor struct {
	sealer atomic.Pointer[sealer] // keys may change
	tcp    net.Listener
	limit  int
	wg     sync.WaitGroup
	ctx    context.Context // of all connections
	quit   context.CancelFunc
	lines  *logLimit // about those that were refused
}

// guestLimit leaves half of the file descriptors for everything else.
func guestLimit() int {
	r := syscall.Rlimit{Cur: 2 * maxInbound} // if it cannot be found out
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r)
	return int(min(maxInbound, max(r.Cur/2, 8)))
}

// close takes nobody in any more, and waits a second at most for what is under way: a peer may read too slowly.
func (gs *acceptor) close() {
	gs.tcp.Close()
	waitAtMost(time.Second, gs.wg.Wait)
	gs.quit()
}

// accept serves what comes in until the port is closed.
func (gs *acceptor) accept(serve func(*session) error) {
	var here []*session // oldest first
	for {
		c, err := gs.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			gs.lines.printf(aboutHost, "accept", "[WARN] cannot accept a connection at %s: %v", gs.tcp.Addr(), err)
			time.Sleep(50 * ms) // out of file descriptors: some will come back
			continue
		}
		here = slices.DeleteFunc(here, func(s *session) bool { return s.gone.Load() })
		if len(here) >= gs.limit {
			i := max(0, slices.IndexFunc(here, func(s *session) bool { return !s.proven.Load() }))
			here[i].Close()
			here = slices.Delete(here, i, i+1)
		}
		c.(*net.TCPConn).SetReadBuffer(64 << 10) // what a stranger may make the kernel hold
		c.SetDeadline(time.Now().Add(helloTimeout))
		s := &session{Conn: c}
		here = append(here, s)
		gs.wg.Go(func() {
			defer s.gone.Store(true)
			defer c.Close()
			defer context.AfterFunc(gs.ctx, func() { c.Close() })()
			gs.sealer.Load().handshake(s)
			c.SetDeadline(time.Now().Add(frameTimeout)) // the first frame answers this hello, and may come from far away
			// Who says nothing, or hangs up, looks whether the port is open.
			if err := serve(s); !timedOut(err) && !errors.Is(plainError(err), errHungUp) && !errors.Is(err, errStopped) {
				gs.logRejected(aboutPeers, addrOf(c.RemoteAddr()), plainError(err))
			}
		})
	}
}

func addrOf(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// logRejected logs what is wrong with what came from there; nil: nothing is.
func (gs *acceptor) logRejected(class logClass, from netip.Addr, err error) {
	if err != nil {
		gs.lines.printf(class, from.String(), "[WARN] dropped what came from %s: it %v", from, err)
	}
}

// ---- sessions of agents ----

// connect dials to within limit, and gives the session as long. A lost SYN costs a second in the kernel, so it dials
// anew after each of waits; joins: for a join. It tells the node from which address the dial went out, where it may take
// another one.
func (g *gossip) connect(ctx context.Context, to netip.AddrPort, joins bool, limit time.Duration, waits ...time.Duration) (c net.Conn, err error) {
	deadline, ip := time.Now().Add(limit), g.cfg.bind.Addr()
	dialer := net.Dialer{KeepAlive: -1, Deadline: deadline}
	if joins && !sameFamily(to.Addr(), ip) { // TCP might get there, but no datagram of this node
		return nil, fmt.Errorf("this agent is bound to %s, an address of another kind (-bind [::]:%d takes both)", ip, g.cfg.bind.Port())
	}
	if !ip.IsUnspecified() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	}
	c, err = dialAgain(ctx, dialer, to, waits)
	switch {
	case err == nil:
		c.SetDeadline(deadline)
		local := addrOf(c.LocalAddr())
		g.noteLocalAddr(local, joins)
		if joins && g.cfg.moves {
			err = g.checkAdvertised(local)
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	case ip.IsLoopback() && !to.Addr().IsLoopback():
		err = fmt.Errorf("this agent is bound to %s, from where no other machine can be reached (-bind sets another address)", ip)
	}
	return nil, plainError(err)
}

// dialAgain dials to, and once more after each of waits. The first answer counts; what was dialled before goes on, since
// its answer may only be far away.
func dialAgain(ctx context.Context, dialer net.Dialer, to netip.AddrPort, waits []time.Duration) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result)
	dial := func() {
		c, err := dialer.DialContext(ctx, "tcp", to.String())
		select {
		case results <- result{c, err}:
		case <-ctx.Done():
			if c != nil {
				c.Close()
			}
		}
	}

	again := time.NewTimer(0)
	defer again.Stop()
	waits = append([]time.Duration{0}, waits...)
	for dialled := 0; ; {
		select {
		case <-again.C:
			go dial()
			dialled++
			if dialled < len(waits) {
				again.Reset(waits[dialled])
			}
		case r := <-results:
			return r.c, r.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// noteLocalAddr is told at which address of this machine a connection stands. It follows a change of addresses where
// the user has not chosen one; settles: it also shows which one leads to the peers.
func (g *gossip) noteLocalAddr(local netip.Addr, settles bool) {
	self, _ := g.self()
	own := self.Addr.Addr()
	if !g.cfg.moves || local == own {
		return
	}

	gone := true
	if g.cfg.iface != "" {
		local = followInterface(g.cfg.iface, own, g.cfg.bind.Addr())
		settles = false
	} else if isReachable(local, g.cfg.bind.Addr()) {
		gone = !isOwnAddress(own)
	} else {
		return
	}
	if local.IsValid() {
		g.post(func(n *node) { n.addressChanged(local, gone, settles, uint64(time.Now().UnixMilli())) })
	}
}

// noteInbound is told at which address of this machine a peer came in; joins: in order to sync. A node that knows
// nobody yet learns from that on which network its peers are. Of the addresses of one kind and interface it keeps its
// own: the other may be a virtual one, which can move to another machine.
func (g *gossip) noteInbound(local netip.Addr, joins bool) {
	self, _ := g.self()
	own := self.Addr.Addr()
	if !g.cfg.moves || local == own {
		return
	}

	alone := false
	if joins {
		g.run(func(n *node) error { alone = n.joining.joinedAt == 0; return nil })
	}
	elsewhere := local.Is4() != own.Is4() || !onOneInterface(local, own)
	g.noteLocalAddr(local, alone && elsewhere)
}

// checkAdvertised says what is wrong with joining from the address local of this machine: a peer could not answer.
func (g *gossip) checkAdvertised(local netip.Addr) error {
	self, _ := g.self()
	if self.Addr.Addr().IsLoopback() && local.Is6() && local.IsLinkLocalUnicast() {
		return errors.New("this machine has only a link-local IPv6 address, which means nothing to others: give its interface another one")
	}
	return nil
}

// isReady reports whether this node has an address to tell.
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
	g.post(func(n *node) { n.addressChanged(ip, true, false, uint64(time.Now().UnixMilli())) })
	close(g.ready)
}

// doFor has the loop run f for a session, unless it has ended; an error of f ends it.
func (g *gossip) doFor(s *session, f func(*node) error) {
	if s.err == nil {
		s.err = g.run(f)
	}
}

// openSession opens a session with a first frame of kind k, and takes the welcome: who is there, what it says of me.
func (g *gossip) openSession(c net.Conn, k msgKind) (s *session, w header, about []update) {
	s = g.acceptor.sealer.Load().handshake(&session{Conn: c, dialled: true})
	var hdr header
	g.doFor(s, func(n *node) error { hdr = n.header(k); return nil })
	s.send(&hdr)
	about = s.receive(&w)
	if s.err == nil && (w.Kind != msgHandshakeReply || validName(w.From) != nil) {
		s.err = errMalformed
	}
	if s.err == nil {
		g.post(func(n *node) { n.noteSessionRoundTrip(w.From, w.born(), s.roundTrip) })
	}
	return s, w, about
}

// tcpProbeTimes is how long a TCP probe may take, which is three round trips and what is lost, and when it dials anew.
func tcpProbeTimes(roundTrip time.Duration) (limit, again time.Duration) {
	return max(probeTimeout, 5*roundTrip), max(150*ms, 2*roundTrip)
}

// tcpProbe looks at a member, and tells the node what it sees. Whoever is cut off looks again: a dying process's
// listener accepts until the kernel has come to it, which resets who dialled just before, and then refuses.
func (g *gossip) tcpProbe(m Member, roundTrip time.Duration) {
	limit, again := tcpProbeTimes(roundTrip)
	ctx, cancel := context.WithTimeout(g.ctx, limit)
	defer cancel()
	tell := func(v verdict, w header) { g.post(func(n *node) { n.handleTCPProbeResult(m, v, w) }) }
	for range 4 {
		c, err := g.connect(ctx, m.Addr, false, sessionTimeout, again, again) // ctx ends it
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
		switch {
		case s.err == nil:
			tell(verdictAlive, w)
			return
		case ctx.Err() != nil:
			return // it accepts and is silent
		}
		tell(verdictNone, header{})
	}
}

// relink makes the watch links that shall stand, and ends all others.
func (g *gossip) relink(self Member, links []Member) {
	old := g.links
	g.links = make(map[string]context.CancelFunc)
	for _, m := range links {
		key := fmt.Sprint(self.Instance, m.Instance, m.Name)
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
func (g *gossip) keepLink(ctx context.Context, m Member) {
	for tries := 1; ctx.Err() == nil; tries++ {
		err := g.linkOnce(ctx, m)
		if err == nil {
			tries = 0
		}
		if ctx.Err() == nil {
			g.post(func(n *node) { n.linkEnded(m, tries, errors.Is(err, syscall.ECONNREFUSED)) })
		}
		wait, cancel := context.WithTimeout(ctx, min(time.Second<<min(max(tries-1, 0), 10), maxLinkWait))
		<-wait.Done()
		cancel()
	}
}

// redialAfter is when a session of more than a look dials anew.
func redialAfter(roundTrip time.Duration) []time.Duration {
	return []time.Duration{max(300*ms, 2*roundTrip), max(400*ms, 2*roundTrip)}
}

// linkOnce returns nil when a link has ended, or why none could be had.
func (g *gossip) linkOnce(ctx context.Context, m Member) error {
	var roundTrip time.Duration
	g.run(func(n *node) error { roundTrip = n.roundTripTo(m); return nil })
	c, err := g.connect(ctx, m.Addr, false, sessionTimeout, redialAfter(roundTrip)...)
	if err != nil {
		return err
	}
	defer c.Close()
	s, w, _ := g.openSession(c, msgLink)
	if s.err != nil || w.From != m.Name || w.born() != m.Instance { // another run answers there: this one has ended
		return s.err
	}
	c.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now()) })()
	if s.receive(&header{}); ctx.Err() != nil && g.ctx.Err() == nil {
		s.err = nil
		s.send(&header{Kind: msgBye}) // nobody has died
	}
	return nil
}

// syncWith compares tables with whoever is at to, as x says; joins: in order to join. It fills x.with.
func (g *gossip) syncWith(to netip.AddrPort, sync *stateSync, joins bool) error {
	c, err := g.connect(g.ctx, to, joins, sessionTimeout, redialAfter(sync.roundTrip)...)
	if err != nil {
		return err
	}
	defer c.Close()
	s, w, about := g.openSession(c, msgSync)
	sync.peer.Addr = to
	sync.roundTrip = s.roundTrip
	differ := false
	welcomed := func(n *node) error {
		differ = w.Digest != n.digest()
		return n.handleWelcome(sync, w, about)
	}
	for g.doFor(s, welcomed); errors.Is(s.err, errConflictPending); g.doFor(s, welcomed) {
		s.err = nil
		time.Sleep(20 * ms)
	}
	if differ {
		g.sendTable(s, sync)
		g.receiveTable(s, sync)
		g.sendTable(s, sync) // the events that only this side has
	}
	g.doFor(s, func(n *node) error { n.syncDone(sync); return nil })
	return plainError(s.err)
}

// sendTable sends the table, hear takes one.
func (g *gossip) sendTable(s *session, sync *stateSync) {
	for more := true; more && s.err == nil; {
		var frame []byte
		g.doFor(s, func(n *node) error { frame, more = n.tableChunk(sync); return nil })
		s.sendBytes(frame)
	}
}

func (g *gossip) receiveTable(s *session, sync *stateSync) {
	for more := true; more && s.err == nil; {
		var hdr header
		s.SetReadDeadline(time.Now().Add(frameTimeout))
		us := s.receive(&hdr)
		g.doFor(s, func(n *node) (err error) {
			bad := 0
			if more, bad, err = n.mergeChunk(sync, hdr, us); bad > 0 {
				g.logRejected(aboutPeers, addrOf(s.RemoteAddr()), fmt.Errorf("sent %d bad records in a table", bad))
			}
			return err
		})
	}
}

// serve answers one agent that has dialled.
func (g *gossip) serve(s *session) error {
	var hdr, w header
	var about []update
	if !g.isReady() {
		return errHungUp // a peer must not learn an address that is only a stopgap
	}
	if s.receive(&hdr); s.err != nil {
		return s.err
	} else if validName(hdr.From) != nil || hdr.Kind < msgTCPProbe || hdr.Kind > msgSync && hdr.Kind <= msgBye {
		return errMalformed
	} else if hdr.Kind > msgBye { // of a later version
		return nil
	}
	g.noteInbound(addrOf(s.LocalAddr()), hdr.Kind == msgSync)
	if hdr.Kind == msgSync {
		select {
		case g.syncSlots <- struct{}{}:
			defer func() { <-g.syncSlots }()
		case <-time.After(syncSlotTimeout):
			return errors.New("wants to compare tables while too many others do")
		}
	}
	g.doFor(s, func(n *node) error { w, about = n.handshakeReply(hdr); return nil })
	s.send(&w, about...)
	switch from := (Member{Name: hdr.From, Instance: hdr.born()}); hdr.Kind {
	case msgLink:
		return g.holdLink(s, from)
	case msgSync: // who hangs up now has the same table
		sync := &stateSync{peer: from, from: addrOf(s.RemoteAddr()), digest: hdr.Digest}
		g.receiveTable(s, sync)
		g.sendTable(s, sync)
		g.receiveTable(s, sync)
	}
	return s.err
}

// holdLink holds a link that m has dialled while m is a member: that of a vanished host would stay for ever.
func (g *gossip) holdLink(s *session, m Member) error {
	for wait := helloTimeout; s.err == nil; wait = maxLinkWait {
		s.SetReadDeadline(time.Now().Add(wait))
		if s.receive(&header{}); s.err == nil {
			return nil // a bye
		}
		quiet := timedOut(s.err)
		s.err = g.run(func(n *node) error {
			if quiet && !n.table.ended(m) {
				return nil
			}
			n.linkEnded(m, 0, false) // of a run that is over this is no news
			return errHungUp
		})
	}
	return s.err
}

// join tries every one of seeds once, all at the same time, and returns what came of them together.
func (g *gossip) join(seeds []string, replay bool) (all seedResult) {
	results := make(chan seedResult, len(seeds))
	for _, seed := range seeds {
		g.wg.Go(func() { results <- g.joinSeed(seed, replay) })
	}
	for range seeds {
		r := <-results
		all.names = append(all.names, r.names...)
		all.errs = append(all.errs, r.errs...)
		all.isSelf = all.isSelf || r.isSelf
	}
	return all
}

// joinSeed syncs with every address of a seed, with each as soon as it is known. One address that answers is enough:
// no look-up that is still under way is waited for then.
func (g *gossip) joinSeed(seed string, replay bool) (r seedResult) {
	ctx, cancel := context.WithCancel(g.ctx)
	defer cancel()
	select {
	case <-g.ready: // until then there is no address to tell the peer
	case <-ctx.Done():
		return r
	}

	type outcome struct {
		at   netip.AddrPort
		peer string
		err  error
	}
	outcomes := make(chan outcome, maxDials)
	lookups := lookUp(ctx, seed, defaultPort)
	var tried []netip.AddrPort
	var failed []string
	for dialling := 0; lookups != nil || dialling > 0; {
		select {
		case l, more := <-lookups:
			if !more {
				lookups = nil
			}
			if l.err != nil {
				failed = append(failed, fmt.Sprintf("%s: %v", seed, l.err))
			}
			for _, at := range l.addrs {
				if len(tried) == maxDials || slices.Contains(tried, at) {
					continue
				}
				tried = append(tried, at)
				dialling++
				g.wg.Go(func() {
					sync := stateSync{joins: true, replay: replay}
					err := g.syncWith(at, &sync, true)
					outcomes <- outcome{at, sync.peer.Name, err}
				})
			}
		case o := <-outcomes:
			dialling--
			r.add(o.at, o.peer, o.err)
		}
		if dialling == 0 && r.answered() {
			lookups = nil
		}
	}
	if len(tried) == 0 { // a name with an A record needs no AAAA
		r.errs = slices.Compact(failed)
	}
	return r
}

// add takes what came of a sync with one address of the seed.
func (r *seedResult) add(at netip.AddrPort, peer string, err error) {
	if err == nil {
		r.names = append(r.names, peer)
		r.errs = nil // one address is enough
		return
	}
	if len(r.names) == 0 {
		r.errs = append(r.errs, fmt.Sprintf("%s: %v", at, err))
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
	Args, DeleteTags        string // both separated by NUL; Drop are the tags to delete
	Prune, Replay, Coalesce bool   // Merge: coalesce the event
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

// callRPC asks the agent at addr and calls each with each answer, until it returns an error (io.EOF: it has
// enough). The first answer, and but for a stream all of them, must come within timeout.
func callRPC(addr, token string, req rpcRequest, timeout time.Duration, each func(rpcResponse, []update) error) error {
	deadline := time.Now().Add(timeout)
	c, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return unreachable(addr, timeout, err)
	}
	defer c.Close()
	c.SetDeadline(deadline)
	b := wire.encode(nil, &req)
	if len(b) > maxFrame {
		return failf("", "the request takes %d bytes, the limit is %d", len(b), maxFrame)
	}
	s := rpcSealer(token, 0).handshake(&session{Conn: c, dialled: true})
	s.sendBytes(b)
	for {
		var a rpcResponse
		us := s.receive(&a)
		if s.err != nil {
			return unreachable(addr, timeout, s.err)
		}
		if a.Error != "" {
			return failf("", "%s", a.Error)
		}
		if err := each(a, us); err == io.EOF {
			return nil
		} else if err != nil || !a.More {
			return err
		}
		if req.Op == "watch" || req.Op == "query" || req.Op == "join" {
			c.SetReadDeadline(time.Time{})
		}
	}
}

// unreachable says why there was no answer.
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
		return failf("-rpc-auth or SERF_RPC_AUTH must be what the agent was started with", "the agent at %s wants another token", addr)
	case timedOut(err):
		return &failure{code: 1, retriable: true, msg: fmt.Sprintf("the agent at %s did not answer within %v", addr, timeout.Round(ms)),
			hint: "it may be stopped or overloaded: look at its process and its log"}
	}
	return &failure{code: 1, retriable: true, msg: fmt.Sprintf("no agent answers at %s: %v", addr, plainError(err)),
		hint: fmt.Sprintf("is the agent running? start it with '%s agent', or say where it is with -rpc-addr or SERF_RPC_ADDR", prog)}
}

// rpcSealer is that of a token, which is a key: it never travels.
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
	gs := &acceptor{tcp: ln, limit: maxRPCConns, lines: g.lines}
	gs.sealer.Store(rpcSealer(token, self.Addr.Port()))
	gs.ctx, gs.quit = context.WithCancel(context.Background())
	gs.wg.Go(func() { gs.accept(func(s *session) error { return g.command(s, ln, info) }) })
	return gs
}

// command does what a command asks for, and answers it.
func (g *gossip) command(s *session, ln net.Listener, info func() []string) (err error) {
	var req rpcRequest
	var a rpcResponse // the last one
	if s.receive(&req); s.err != nil {
		return fmt.Errorf("came to the RPC, and %w", s.err)
	}
	s.SetDeadline(time.Time{})
	switch req.Op {
	case "members":
		g.list(s)
	case "join":
		err = g.joinCommand(s, req, &a)
	case "leave":
		g.cfg.log.Print("[INFO] told to leave the cluster")
		ln.Close() // who reads the answer may start the next agent at once
		err = g.leave()
	case "force-leave":
		err = g.run(func(n *node) error { return n.forceLeave(req.Name, req.Prune) })
	case "event":
		err = g.userEvent(req)
	case "tags":
		err = g.run(func(n *node) error { return n.setTags(Tags(req.Args).asMap(), splitNUL(req.DeleteTags)) })
	case "info":
		s.sendFacts(info())
	case "query":
		var who []string
		f := &subscriber{}
		err = g.run(func(n *node) (err error) {
			if f.query, who, err = n.query(req.Name, req.Payload, splitNUL(req.Args), req.Timeout); err == nil {
				f.events = make(chan *item, 2*len(who)+1) // each has the query, and answers it; then it is over
				g.subscribers[f] = true
			}
			return err
		})
		if err == nil {
			s.send(&rpcResponse{More: true, Text: strings.Join(who, "\x00")})
			g.stream(s, f)
		}
	case "watch":
		f := &subscriber{events: make(chan *item, maxWatchQueue)}
		g.doFor(s, func(*node) error { g.subscribers[f] = true; return nil })
		s.patient = true
		g.list(s)
		g.stream(s, f)
	default:
		err = fmt.Errorf("this agent knows no request %q", req.Op)
	}
	if err != nil {
		a.Error = err.Error()
	}
	s.send(&a)
	return s.err
}

// joinCommand joins, for as long as the resolver and the peers take. An address of this node itself counts as one
// that was contacted, as in Serf: start scripts run the same join on every node.
func (g *gossip) joinCommand(s *session, req rpcRequest, a *rpcResponse) error {
	if !g.isReady() {
		return fmt.Errorf("cannot join yet: %s", g.cfg.awaits)
	}
	s.send(&rpcResponse{More: true}) // it may take longer than the command waits for an agent that is stopped
	r := g.join(splitNUL(req.Args), req.Replay)
	a.Count = len(r.names)
	if r.isSelf {
		a.Count++
		a.Text = strings.Join(r.errs, "; ")
	}
	if a.Count == 0 {
		return errors.New(strings.Join(r.errs, "; "))
	}
	return nil
}

// sendFacts sends strings in frames of some KiB.
func (s *session) sendFacts(facts []string) {
	var page []string
	size := 0
	for _, fact := range facts {
		fact = strings.ReplaceAll(fact[:min(len(fact), factsPage)], "\x00", "")
		page = append(page, fact)
		size += len(fact)
		if size > factsPage {
			s.send(&rpcResponse{More: true, Text: strings.Join(page, "\x00")})
			page = nil
			size = 0
		}
	}
	s.send(&rpcResponse{More: true, Text: strings.Join(page, "\x00")})
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

// list sends all members, few at a time: a reader that does not read costs a page, however many they are.
func (g *gossip) list(s *session) {
	for after, more := "", true; more && s.err == nil; {
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

// subscriber holds the events for one reader, who may be slow: a query's answers, or (query 0) all else.
type subscriber struct {
	query   uint32
	events  chan *item
	dropped int // events that did not fit, since the last one that did
}

type item struct {
	Event
	at      time.Time
	dropped int // before it
}

// publish never blocks; what a reader is too slow for is counted.
func (f *subscriber) publish(ev Event) {
	if ev.kind == eventAnswer && ev.id != f.query || ev.kind != eventAnswer && f.query != 0 {
		return
	}
	select {
	case f.events <- &item{ev, time.Now(), f.dropped}:
		f.dropped = 0
	default:
		f.dropped++
	}
}

// stream sends what f brings until the reader or the agent has gone, or the query is over.
func (g *gossip) stream(s *session, f *subscriber) {
	defer g.post(func(*node) { delete(g.subscribers, f) })
	gone := make(chan struct{})
	go func() { io.Copy(io.Discard, s.Conn); close(gone) }()
	for s.err == nil {
		select {
		case ev := <-f.events:
			if ev.kind == eventAnswer && ev.reply == replyNone {
				return
			}
			s.send(&rpcResponse{More: true, Kind: ev.kind, Reply: ev.reply, At: ev.at.UnixNano(), Dropped: ev.dropped}, ev.update)
		case <-gone:
			return
		case <-g.done:
			return
		}
	}
}
