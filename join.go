// join.go: how a node comes, keeps in step, and goes.
//
// The part of the node (gossip.go) that speaks over streams: watch links, the
// exchange of tables that joins and repairs, the seeds; then what it does about
// claims that concern itself, namesakes among them; and leaving.

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// ---- streams ----

// stream is one TCP connection as the protocol sees it. The first frame and
// its answer exchange challenges; nothing counts that does not give mine back,
// so a recorded stream proves nothing.
type stream struct {
	id          connID
	want        kind
	out         bool // dialled by me
	open        bool // both challenges were answered
	e           *entry
	born        uint64
	name        string // who is there, once known
	addr        netip.AddrPort
	nonce, echo uint64
	by          time.Duration // when to give up; 0: never
	up          bool          // the dial was answered
	redials     int
	probe       *probe
	attempt     *attempt
	owed        int               // bytes of my table that were sent
	told        int               // updates that came
	theirs      map[string]Member // what the other side is known to have
	events      map[uint64]bool
	whole       bool // the other side's table has come
}

func (n *node) stream(id connID) *stream {
	for _, s := range n.streams {
		if s.id == id {
			return s
		}
	}
	return nil
}

// dial opens a stream to addr; e is whom it is meant for, if that is known.
func (n *node) dial(addr netip.AddrPort, want kind, name string) *stream {
	n.nextConn++
	s := &stream{id: n.nextConn, want: want, out: true, addr: addr, name: name, nonce: n.rng.Uint64() | 1, by: n.now + streamFor, theirs: make(map[string]Member), events: make(map[uint64]bool)}
	if e := n.t.get(name); e != nil {
		s.e, s.born = e, e.Born
	}
	n.streams = append(n.streams, s)
	n.out.streams = append(n.out.streams, streamOp{op: opDial, id: s.id, to: addr})
	return s
}

func (n *node) sendFrame(s *stream, h head, body []byte) {
	h.Echo = s.echo
	n.out.streams = append(n.out.streams, streamOp{op: opSend, id: s.id, data: append(n.Codec.head(nil, &h), body...)})
}

// drop forgets a stream and closes it after what was sent.
func (n *node) drop(s *stream) {
	n.streams = slices.DeleteFunc(n.streams, func(o *stream) bool { return o == s })
	n.out.streams = append(n.out.streams, streamOp{op: opClose, id: s.id})
}

func (n *node) bye(s *stream) {
	if s.open || !s.out { // else nobody has answered yet: there is nothing to take back
		n.sendFrame(s, n.head(kBye), nil)
	}
	n.drop(s)
}

func (n *node) dialLook(p *probe) {
	s := n.dial(p.e.Addr, kLook, p.e.Name)
	s.probe, s.by = p, 0
}

func (n *node) looking(p *probe) bool {
	return slices.ContainsFunc(n.streams, func(s *stream) bool { return s.probe == p })
}

func (n *node) dropLooks(p *probe) {
	for _, s := range slices.Clone(n.streams) {
		if s.probe == p {
			n.drop(s)
		}
	}
}

// dialed takes the result of an opDial: nil, errRefused, or why nothing came.
func (n *node) dialed(now time.Duration, id connID, err error) {
	n.advance(now)
	s := n.stream(id)
	if s == nil {
		return
	}
	if err == nil || errors.Is(err, errRefused) {
		n.heard = n.now
	}
	if err != nil {
		n.lostStream(s, err)
		return
	}
	s.up = true
	if s.probe != nil {
		n.observed(s.probe, vSilent)
	}
	h := n.head(s.want)
	h.Nonce = s.nonce
	n.sendFrame(s, h, nil)
}

// closed takes the end of a stream that the other side, or the network, ended.
func (n *node) closed(now time.Duration, id connID, err error) {
	n.advance(now)
	if s := n.stream(id); s != nil {
		n.lostStream(s, err)
	}
}

// lostStream draws what conclusions the end of a stream allows. The end of a
// watch link is evidence that starts a probe, never a verdict.
func (n *node) lostStream(s *stream, err error) {
	n.drop(s)
	refused := errors.Is(err, errRefused)
	switch {
	case s.probe != nil && refused:
		n.observed(s.probe, vRefused)
	case s.probe != nil:
		if s.probe.mine == vSilent && !n.looking(s.probe) {
			s.probe.mine = vNone // it accepted and hung up
		}
		// A dying process's listener accepts until the kernel has come to it: who
		// dialled just before is reset, and now it refuses.
		if s.probe.resets++; s.probe.resets <= 3 {
			n.dialLook(s.probe)
		}
	case n.rival != nil && n.rival.look == s.id:
		if refused {
			n.rivalGone()
		}
	case s.want == kWatch && !s.out && !s.open: // it was never a link
	case s.want == kWatch && s.e != nil && s.e.Born == s.born && !s.e.Status.dead() && !s.e.lost && n.leave == nil:
		if p := n.startProbe(s.e); p != nil {
			p.ended = p.ended || s.open
			if refused {
				n.observed(p, vRefused)
			}
		}
		if s.out {
			n.noLink(s.e)
		}
	case s.attempt != nil:
		n.attempted(s.attempt, s.addr, err)
	}
}

// frame takes one frame, already opened. After an error the caller closes the
// stream.
func (n *node) frame(now time.Duration, id connID, b []byte) error {
	n.advance(now)
	h, rest, err := n.Codec.readHead(b)
	if err != nil {
		return err
	}
	if n.leave != nil {
		return nil
	}
	s := n.stream(id)
	switch {
	case s == nil && id > 0:
		return nil // dropped by me; what was under way comes late
	case s == nil:
		return n.accept(id, h)
	case h.Echo != s.nonce:
		return errors.New("the stream does not answer its challenge")
	case h.Kind == kBye && s.want == kWatch:
		n.drop(s)
		return nil
	case h.Kind == kWelcome && s.out && !s.open && validName(h.From) == nil:
		n.heard = n.now
		s.open, s.echo = true, h.Nonce
		return n.welcomed(s, h)
	case h.Kind == kConfirm && !s.out && s.want == kWatch:
		n.heard, s.open = n.now, true
		return nil
	case h.Kind == kTable && s.want == kExchange && (s.open || !s.out):
		n.heard = n.now
		return n.table(s, h, rest)
	}
	return fmt.Errorf("unexpected frame kind %d", h.Kind)
}

// accept answers the first frame of an inbound stream.
func (n *node) accept(id connID, h head) error {
	if h.Kind != kLook && h.Kind != kWatch && h.Kind != kExchange {
		return fmt.Errorf("unexpected first frame, kind %d", h.Kind)
	}
	if err := validName(h.From); err != nil {
		return err
	}
	s := &stream{id: id, want: h.Kind, name: h.From, born: h.born(), nonce: n.rng.Uint64() | 1, echo: h.Nonce, by: n.now + streamFor, theirs: make(map[string]Member), events: make(map[uint64]bool)}
	s.e = n.t.get(h.From)
	n.streams = append(n.streams, s)
	w := n.head(kWelcome)
	w.Nonce = s.nonce
	n.sendFrame(s, w, nil)
	if h.Kind == kExchange && h.Digest != w.Digest {
		return n.sendTable(s)
	}
	return nil
}

// burden is what open streams cost: bytes of my table on their way, and updates
// that accepted ones have brought. A stranger may ask often and read nothing, or
// open many and never end.
func (n *node) burden() (owed, told int) {
	for _, s := range n.streams {
		owed += s.owed
		if !s.out {
			told += s.told
		}
	}
	return owed, told
}

// welcomed handles the answer to my first frame: now I know who is there.
func (n *node) welcomed(s *stream, h head) error {
	if s.want == kExchange {
		return n.welcomedExchange(s, h)
	}
	if n.rival != nil && n.rival.look == s.id {
		n.drop(s)
		if h.From == n.self.Name && h.born() != n.self.Born {
			n.rivalAnswered(h.born())
		} else {
			n.rivalGone()
		}
		return nil
	}
	same := s.e != nil && h.From == s.e.Name && h.born() == s.born
	if same {
		n.twoWay(s.e)
	}
	switch {
	case s.want == kWatch && same:
		s.by, n.peer(s.e).noLink = 0, 0
		n.sendFrame(s, n.head(kConfirm), nil)
		return nil
	case s.probe != nil && same:
		p := s.probe
		n.drop(s)
		n.observed(p, vAlive)
		return nil
	}
	n.drop(s)
	switch {
	case s.probe != nil: // another process lives at its address: it did not stall
		if s.probe.mine == vSilent {
			s.probe.mine = vNone
		}
		n.observed(s.probe, vRefused)
	case s.want == kWatch && s.e != nil && s.e.Born == s.born && !s.e.Status.dead():
		n.startProbe(s.e)
		n.noLink(s.e)
	}
	return nil
}

// stepStreams gives up streams whose time is over.
func (n *node) stepStreams() {
	for _, s := range slices.Clone(n.streams) {
		n.redial(s)
		switch {
		case s.by == 0:
		case n.now < s.by:
			n.at(s.by)
		case !s.out && s.want == kWatch && s.open && n.linked(s):
			s.by = 0
		default:
			n.lostStream(s, fmt.Errorf("no answer within %v", streamFor))
		}
	}
}

// redial makes a dial anew that nothing has answered yet: a lost SYN costs a
// second in the kernel. The last one stands, for networks that are that slow.
func (n *node) redial(s *stream) {
	after := []time.Duration{300 * ms, 700 * ms}
	rival := n.rival != nil && n.rival.look == s.id
	if !s.out || s.up || s.by == 0 || s.want == kLook && !rival || s.redials == len(after) {
		return
	}
	if at := s.by - streamFor + after[s.redials]; n.now < at {
		n.at(at)
		return
	}
	n.nextConn++
	n.out.streams = append(n.out.streams, streamOp{op: opClose, id: s.id}, streamOp{op: opDial, id: n.nextConn, to: s.addr})
	s.id = n.nextConn
	s.redials++
	if rival {
		n.rival.look = s.id
	}
}

// linked reports whether an inbound watch link is of a member that I know; it
// may stay, all others are closed after a while.
func (n *node) linked(s *stream) bool {
	s.e = n.t.get(s.name)
	return s.e != nil && s.e.Born == s.born && !s.e.Status.dead()
}

// stepLinks keeps a watch link to the first two ring successors and ends those
// that the rings no longer ask for.
func (n *node) stepLinks() {
	if n.linkAt == 0 || n.now < n.linkAt {
		n.at(n.linkAt)
		return
	}
	n.linkAt = 0
	want := n.t.watchers(n.self)
	want = want[:min(len(want), linkCount)]
	for _, s := range slices.Clone(n.streams) {
		if s.want != kWatch {
			continue
		}
		i := slices.Index(want, s.e)
		switch {
		case s.out && i >= 0 && s.e.Born == s.born:
			want = slices.Delete(slices.Clone(want), i, i+1)
		case s.out, s.open && s.by == 0 && !n.linked(s):
			n.bye(s)
		}
	}
	for _, e := range want {
		if p := n.peer(e); n.now >= p.linkAt {
			n.dial(e.Addr, kWatch, e.Name)
		} else if n.linkAt == 0 || p.linkAt < n.linkAt {
			n.linkAt = p.linkAt
		}
	}
	n.at(n.linkAt)
}

// noLink notes that no watch link to e could be had. It is tried more and more
// rarely: each failure starts a probe, and a firewall stays.
func (n *node) noLink(e *entry) {
	p := n.peer(e)
	p.noLink++
	p.linkAt = n.now + min(time.Second<<min(p.noLink-1, 10), seedsMax)
	n.linkAt = n.now + time.Second
	if p.noLink == 4 {
		n.logf("[WARN] no TCP connection to %s at %s lasts: is TCP blocked between it and %s?", e.Name, e.Addr, n.self.Addr)
	}
}

// ---- table exchange and joining ----

// exchange compares tables with e now.
func (n *node) exchange(e *entry) {
	if !slices.ContainsFunc(n.streams, func(s *stream) bool { return s.out && s.want == kExchange && s.e == e }) {
		n.logf("[DEBUG] comparing tables with %s at %s", e.Name, e.Addr)
		n.dial(e.Addr, kExchange, e.Name)
	}
}

// wantRepair plans an exchange with a peer whose digest differs. The random
// wait lets a flood that is under way arrive first.
func (n *node) wantRepair(e *entry, digest uint64) {
	if n.repairWith == "" {
		n.repairWith, n.repairSeen = e.Name, digest
		n.repairAt = max(n.repairAt+repairEvery, n.now) + 20*ms + n.jitter(100*ms)
	}
}

func (n *node) stepRepair() {
	if n.repairWith == "" || n.now < n.repairAt {
		if n.repairWith != "" {
			n.at(n.repairAt)
		}
		return
	}
	e := n.t.get(n.repairWith)
	n.repairWith = ""
	if e != nil && !e.Status.dead() && n.digest() != n.repairSeen {
		n.exchange(e)
	}
}

// sendTable sends what the other side is not known to have, of the table and of
// the remembered events. The claim about the receiver comes first: a newcomer
// whose name is taken must learn it before it believes the rest.
func (n *node) sendTable(s *stream) error {
	if owed, _ := n.burden(); owed > maxOwed && !s.out {
		return errors.New("wants the table while too many others do")
	}
	var body []byte
	piece := func(more bool, u []byte) {
		if !more || len(body)+len(u) > maxFrame-512 {
			h := n.head(kTable)
			h.More = more
			n.sendFrame(s, h, body)
			s.owed += len(body)
			body = nil
		}
		body = append(body, u...)
	}
	member := func(e *entry) {
		m, told := s.theirs[e.Name]
		if e.reaped || e == n.self && n.rival != nil || told && !e.supersedes(m) {
			return
		}
		s.theirs[e.Name] = e.Member
		piece(true, n.claim(e, ""))
	}
	if e := n.t.get(s.name); e != nil {
		member(e)
	}
	for _, e := range n.t.ordered {
		member(e)
	}
	for _, ev := range n.recent {
		if !s.events[ev.key] {
			s.events[ev.key] = true
			piece(true, ev.data)
		}
	}
	piece(false, nil)
	return nil
}

func (n *node) welcomedExchange(s *stream, h head) error {
	s.name = h.From
	if h.From == n.self.Name && h.born() == n.self.Born {
		n.lostStream(s, errMyself)
		return nil
	}
	n.placed = n.placed || s.attempt != nil
	if e := n.t.get(h.From); e != nil && e.Born == h.born() {
		n.twoWay(e)
	}
	if h.Digest == n.digest() {
		for _, e := range n.t.ordered {
			n.t.setLost(e, false) // the same table vouches for all of them
		}
		n.exchanged(s)
	}
	return nil
}

// table merges one piece of the other side's table. Whoever has all of it
// answers with what the other side lacks: the dialler with its own table, then
// the acceptor with what it learnt meanwhile, which no flood could bring to
// somebody unknown. Then both have the same.
func (n *node) table(s *stream, h head, rest []byte) error {
	s.by = n.now + streamFor
	if _, told := n.burden(); told > 2*maxMembers && s.told > maxMembers/64 && !s.out {
		return errors.New("brings its table while too many others do")
	}
	for len(rest) > 0 {
		var u update
		var err error
		if u, rest, err = n.Codec.readUpdate(rest); err != nil {
			return err
		}
		if s.told++; s.told > maxMembers+maxEvents {
			return errors.New("its table never ends")
		}
		if err := n.merge(s, &u); err != nil {
			return err
		}
		if n.rival != nil && !n.everJoined {
			if n.drop(s); s.out {
				n.rival.again = append(n.rival.again, s)
			}
			return nil
		}
	}
	if h.More {
		return nil
	}
	switch {
	case !s.out:
		n.joinedNow()
		return n.sendTable(s)
	case s.whole:
		n.exchanged(s)
	default:
		s.whole = true
		return n.sendTable(s)
	}
	return nil
}

// exchanged ends an exchange of mine that went well.
func (n *node) exchanged(s *stream) {
	n.joinedNow()
	n.drop(s)
	if s.attempt == nil {
		return
	}
	if e := n.t.get(s.name); e != nil && e.Addr != s.addr {
		n.logf("[INFO] %s was reached at %s and advertises %s", e.Name, s.addr, e.Addr)
	}
	s.attempt.names = append(s.attempt.names, s.name)
	n.attempted(s.attempt, s.addr, nil)
}

func (n *node) joinedNow() {
	if !n.everJoined {
		n.everJoined = true
		n.refreshRing()
		n.flood(n.self.Name, n.claim(n.self, ""))
	}
}

// merge takes one update of another table.
func (n *node) merge(s *stream, u *update) error {
	if u.Event != "" {
		s.events[u.eventKey()] = true
		return n.learnEvent(u, n.everJoined || !s.out)
	}
	m, err := u.member()
	if err != nil {
		return err
	}
	s.theirs[m.Name] = m
	e := n.t.get(m.Name)
	switch {
	case m.Name == n.self.Name:
		n.aboutMe(m, "", s.name)
		return nil
	case (s.out || s.name != m.Name) && n.disputed(e, m): // who dials me with its own name has met the holder
		n.startProbe(e)
		if s.name == m.Name {
			return taken(e.Member)
		}
		n.send(e, n.head(kFlood), n.Codec.update(nil, u)) // which settles it
		return nil
	case e != nil && !m.Status.dead() && m.Incarnation >= e.Incarnation:
		n.t.setLost(e, false) // vouched for by somebody I am connected to
	case e != nil && m.Status == StatusFailed && !e.Status.dead() && !e.lost && m.Born == e.Born && m.Incarnation >= e.Incarnation:
		n.doubt(e, m, s.name)
		return nil
	}
	n.adopt(m, u)
	return nil
}

func taken(by Member) error {
	return fmt.Errorf("the name %q is taken: the member at %s has it", by.Name, by.Addr)
}

// disputed reports whether m claims the name of a member that may well live
// elsewhere: two clusters meet, and nobody shall be called failed for it. Once
// the holder has not answered for a while, it is no longer.
func (n *node) disputed(e *entry, m Member) bool {
	if e == nil || e.visible() != StatusAlive || m.Born == e.Born || m.Addr == e.Addr || !m.supersedes(e.Member) {
		return false
	}
	p := n.peer(e)
	if p.answered >= p.disputed {
		p.disputed = n.now
	}
	return n.now-p.disputed < rivalFor
}

// doubt looks at a member that another table has as failed. Adopting it undid
// heals: each side of a split would kill the other anew with its old verdicts.
func (n *node) doubt(e *entry, m Member, by string) {
	// It is told what is said, so that it can refute at once: after a split the
	// last members would else wait until somebody of the other side pings them.
	u := memberUpdate(m)
	u.By = by
	n.send(e, n.head(kFlood), n.Codec.update(nil, &u))
	m.Status = StatusAlive
	n.t.apply(n.now, m, 0)
	if p := n.startProbe(e); p != nil {
		n.addVote(p, by, vUnreachable)
	}
}

var errMyself = errors.New("that is this node itself")

// attempt is one try to join, at several addresses at the same time.
type attempt struct {
	joined
	open  int
	names []string // who answered
}

// join tries all addrs at once. The result comes as outputs.joins, with token;
// errs are failures that happened before (names that did not resolve).
func (n *node) join(now time.Duration, token int, addrs []netip.AddrPort, errs []string) {
	n.advance(now)
	a := &attempt{joined: joined{token: token, errs: errs}}
	addrs = addrs[:min(len(addrs), maxDials)]
	a.open = len(addrs) + 1
	n.attempts = append(n.attempts, a)
	for _, addr := range addrs {
		n.dial(addr, kExchange, "").attempt = a
	}
	n.attemptOver(a)
}

func (n *node) attempted(a *attempt, addr netip.AddrPort, err error) {
	if err == nil {
		a.ok++
	} else {
		a.errs = append(a.errs, fmt.Sprintf("%s: %v", addr, err))
	}
	n.attemptOver(a)
}

func (n *node) attemptOver(a *attempt) {
	if a.open--; a.open > 0 && (a.token != 0 || a.ok == 0 || n.seeds.done) {
		return
	}
	if a.token == 0 {
		n.seedsTried(a)
	}
	if a.open == 0 {
		n.attempts = slices.DeleteFunc(n.attempts, func(o *attempt) bool { return o == a })
		n.out.joins = append(n.out.joins, a.joined)
	}
}

// seedState is how joining the seeds goes.
type seedState struct {
	running bool
	done    bool // this round has been judged
	at      time.Duration
	rounds  int // failed in a row
	warned  time.Duration
	first   bool     // it was said that this node is its only seed
	names   []string // members that answered at a seed's address
}

// seeded reports whether some seed is an alive member. As long as none is,
// trying goes on, or two halves of a cluster would stay apart for ever.
func (n *node) seeded() bool {
	return slices.ContainsFunc(n.seeds.names, func(name string) bool {
		e := n.t.get(name)
		return e != nil && e != n.self && e.visible() == StatusAlive
	})
}

func (n *node) stepSeeds() {
	s := &n.seeds
	if len(n.Seeds) == 0 || s.running || n.seeded() {
		return
	}
	if n.now < s.at {
		n.at(s.at)
		return
	}
	s.running, s.done, n.out.resolve = true, false, true
}

// seedsResolved starts a round with all addresses of all seeds.
func (n *node) seedsResolved(now time.Duration, addrs []netip.AddrPort, errs []string) {
	n.join(now, 0, addrs, errs)
}

// seedsTried judges a round, as soon as one seed has answered or all failed.
func (n *node) seedsTried(a *attempt) {
	s := &n.seeds
	s.names = append(s.names[:max(0, len(s.names)-64)], a.names...)
	s.running = a.open > 0
	if s.done {
		return
	}
	s.done = true
	if a.ok > 0 {
		if s.rounds > 0 {
			n.logf("[INFO] joined through %s", strings.Join(a.names, ", "))
		}
		s.rounds, s.at = 0, n.now+time.Second
		return
	}
	s.rounds++
	if n.RetryMax > 0 && s.rounds >= n.RetryMax && !n.everJoined {
		n.out.fatal = fmt.Errorf("no seed answered in %d rounds (%s)", s.rounds, strings.Join(a.errs, "; "))
		return
	}
	wait := min(250*ms<<min(s.rounds-1, 10), seedsMax)
	s.at = n.now + wait - n.jitter(wait/4)
	others := slices.ContainsFunc(a.errs, func(e string) bool { return !strings.HasSuffix(e, errMyself.Error()) })
	switch text := strings.Join(a.errs[:min(len(a.errs), 5)], "; "); {
	case others && (s.warned == 0 || n.now-s.warned >= 10*time.Minute):
		s.warned = n.now
		n.logf("[WARN] no seed answers (%s): trying on, at most every %v", text, seedsMax)
	case !others && !s.first: // one list of seeds for all is usual, and somebody is the first on it
		s.first = true
		n.logf("[INFO] no seed answers but this node itself (%s)", text)
	}
}

// ---- claims about oneself ----

// rival is another instance of my name that some claim speaks of.
type rival struct {
	m     Member
	seq   uint32
	start time.Duration
	pings int
	look  connID
	again []*stream // joins to make anew when it is found gone
}

// aboutMe handles a claim about this node. A false one is refuted with a
// higher incarnation: to everybody, and directly to whoever said so, since a
// flood stays on its own side of a split.
func (n *node) aboutMe(m Member, by, via string) {
	if m.Born == n.self.Born && m.Addr.Compare(n.self.Addr) > 0 && n.leave == nil {
		n.reborn(n.self.Addr, max(m.Incarnation, n.self.Incarnation)+1) // a namesake of the same millisecond: one must be younger
	}
	former := m.Born != n.self.Born
	switch {
	case n.leave != nil, m == n.self.Member:
	case former && !m.Status.dead() && m.Addr != n.self.Addr && !n.isGone(m):
		n.meetRival(m)
	case m.Incarnation >= n.self.Incarnation:
		n.raise(m.Incarnation + 1)
		n.tellMine(via)
		if by != via {
			n.tellMine(by)
		}
	default: // it has missed my refutation
		n.tellMine(via)
	}
}

func (n *node) tellMine(name string) {
	if e := n.t.get(name); e != nil && e != n.self {
		n.send(e, n.head(kFlood), n.claim(n.self, ""))
	}
}

// moved takes another address, the one from which dial id went out: what this
// node advertises is no longer (gone) an address of this machine, or was not the
// way to the first seed that answers. To the others it is a restart.
func (n *node) moved(now time.Duration, id connID, ip netip.Addr, gone bool, unixMs uint64) {
	n.advance(now)
	s, m := n.stream(id), n.self.Member
	first := !n.placed && !n.everJoined && s != nil && s.attempt != nil
	if n.leave != nil || !first && !gone || ip == m.Addr.Addr() {
		return
	}
	n.outlived = m
	n.reborn(netip.AddrPortFrom(ip, m.Addr.Port()), max(unixMs, m.Incarnation+1))
	n.logf("[INFO] this node has the address %s now and advertises it", ip)
}

// reborn makes this node another instance of itself.
func (n *node) reborn(addr netip.AddrPort, born uint64) {
	m := n.self.Member
	m.Addr, m.Born, m.Incarnation = addr, born, born
	n.self.told = m
	n.t.apply(n.now, m, 0)
	for _, s := range slices.Clone(n.streams) {
		if s.want == kWatch {
			n.drop(s)
		}
	}
	n.linkAt = n.now
	n.flood(m.Name, n.claim(n.self, ""))
}

// isGone reports whether m was found gone. One that has raised its incarnation
// since then was only stopped or cut off: two would claim the name for ever.
func (n *node) isGone(m Member) bool {
	return m.Born == n.outlived.Born && m.Incarnation <= n.outlived.Incarnation
}

// raise takes a higher incarnation and tells everybody.
func (n *node) raise(inc uint64) {
	m := n.self.Member
	m.Incarnation = inc
	n.logf("[DEBUG] refuting what is said of this node, incarnation %d", inc)
	n.t.apply(n.now, m, 0)
	if n.rival == nil || n.everJoined {
		n.flood(m.Name, n.claim(n.self, ""))
	}
}

// meetRival asks at the rival's address whether it really lives.
func (n *node) meetRival(m Member) {
	if n.rival == nil {
		n.rival = &rival{m: m, seq: n.nextSeq(), start: n.now}
		n.rival.look = n.dial(m.Addr, kLook, "").id
		n.stepRival()
	}
}

func (n *node) stepRival() {
	r := n.rival
	if r == nil {
		return
	}
	if n.now-r.start >= rivalFor {
		n.rivalGone()
		return
	}
	if due := time.Duration(r.pings) * 150 * ms; n.now-r.start >= due {
		r.pings++
		h := n.head(kPing)
		h.Seq, h.Target = r.seq, n.self.Name
		n.sendTo(r.m.Addr, n.self.Name, h)
	}
	n.at(min(r.start+time.Duration(r.pings)*150*ms, r.start+rivalFor))
}

// rivalGone takes the name over.
func (n *node) rivalGone() {
	r := n.rival
	n.rival, n.outlived = nil, r.m
	if s := n.stream(r.look); s != nil {
		n.drop(s)
	}
	if r.m.Incarnation >= n.self.Incarnation {
		n.raise(r.m.Incarnation + 1)
	}
	r.joinAgain(n)
}

func (r *rival) joinAgain(n *node) {
	for _, s := range r.again {
		n.dial(s.addr, kExchange, "").attempt = s.attempt
	}
}

// rivalAnswered settles a real conflict: a newcomer never disturbs the holder
// of a name, and after a split the younger instance gives way.
func (n *node) rivalAnswered(born uint64) {
	r := n.rival
	n.rival = nil
	if s := n.stream(r.look); s != nil {
		n.drop(s)
	}
	if !n.everJoined || n.self.Born > born || n.self.Born == born && r.m.Addr.Compare(n.self.Addr) < 0 {
		err := taken(r.m)
		asked := func(s *stream) bool { return s.attempt != nil && s.attempt.token != 0 }
		if n.everJoined || !slices.ContainsFunc(r.again, asked) {
			n.out.fatal = err
			return
		}
		for _, s := range r.again { // the join command was wrong, not this agent
			if s.attempt != nil {
				n.attempted(s.attempt, s.addr, err)
			}
		}
		return
	}
	r.joinAgain(n)
	n.raise(max(r.m.Incarnation, n.self.Incarnation) + 1)
	h := n.head(kFlood)
	h.To = uint32(born)
	n.sendTo(r.m.Addr, n.self.Name, h, n.claim(n.self, ""))
}

// ---- leaving ----

type leaving struct {
	seq     uint32
	data    []byte
	waiting []*entry // watchers that have not acknowledged
	until   time.Duration
	again   time.Duration
}

// startLeave floods that this node leaves. outputs.left follows when all
// watchers know, or after leaveFor.
func (n *node) startLeave(now time.Duration) {
	n.advance(now)
	if n.leave != nil {
		return
	}
	n.refreshRing()
	m := n.self.Member
	m.Status = StatusLeft
	u := memberUpdate(m)
	n.leave = &leaving{seq: n.nextSeq(), data: n.Codec.update(nil, &u), until: n.now + leaveFor}
	for _, w := range n.watchers {
		n.leave.waiting = append(n.leave.waiting, w.e)
	}
}

func (n *node) stepLeave() {
	l := n.leave
	if len(l.waiting) == 0 || n.now >= l.until {
		n.out.left = true
		return
	}
	if n.now >= l.again {
		l.again = n.now + 100*ms
		h := n.head(kFlood)
		h.Seq = l.seq
		for _, w := range l.waiting {
			h.Target = w.Name // also makes room for the answer, which is never larger
			n.send(w, h, l.data)
		}
	}
	n.at(min(l.again, l.until))
}

// forceLeave makes everybody believe that a failed member has left; with prune
// it also vanishes.
func (n *node) forceLeave(now time.Duration, name string, prune bool) error {
	n.advance(now)
	e := n.t.get(name)
	switch {
	case e == nil || e.reaped || e.Status == StatusPruned:
		return fmt.Errorf("no member is called %q", name)
	case e == n.self || e.visible() == StatusAlive:
		return fmt.Errorf("member %q is alive: only a failed one can be made to leave", name)
	case !e.Status.dead():
		return fmt.Errorf("this node is cut off and cannot judge %q", name)
	}
	m := e.Member
	m.Status = StatusLeft
	if prune {
		m.Status = StatusPruned
	}
	if n.t.apply(n.now, m, 0) {
		n.flood(name, n.claim(e, ""))
	}
	return nil
}

// members is what users see.
func (n *node) members() []Member {
	ms := n.t.snapshot()
	for i := range ms {
		if n.leave != nil && ms[i].Name == n.self.Name {
			ms[i].Status = StatusLeaving
		}
	}
	return ms
}

// reapEvery is short: until everybody has forgotten a member, digests differ.
func (n *node) reapEvery() time.Duration { return min(max(n.ReapAfter/10, 100*ms), time.Second) }

// stepReap forgets the long dead, and the protocol's state about them.
func (n *node) stepReap() {
	if n.now >= n.reapAt {
		n.reapAt = n.now + n.reapEvery()
		n.t.reap(n.now, n.ReapAfter)
		for name, p := range n.peers { // order cannot show: nothing is sent
			if n.t.get(name) == nil || p.e != n.t.get(name) {
				delete(n.peers, name)
			}
		}
	}
	if n.t.alive() == 1 && len(n.t.ordered) > 1 { // else heartbeats wake often enough
		n.at(n.reapAt)
	}
}
