// gossip.go: the protocol as a pure state machine.
//
// A node takes the time and what arrived (datagrams, stream frames, results of
// dials), and gives back outputs: packets, stream operations, events, log
// lines, and when it wants to be woken. It reads no clock, socket or global
// random source, starts no goroutine and holds no lock; transport.go does all
// that and owns the node. What wins among claims is decided in members.go.
//
// Here: numbers, messages, the node and its inputs, heartbeats, floods. Who has
// died is found out in detect.go; joining, leaving and comparing tables is in
// join.go.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const ms = time.Millisecond

// The protocol's times and bounds. They were settled in simulation; the
// scenarios in sim_test.go are the measurements.
const (
	beatEvery    = 500 * ms // one heartbeat, to one watcher at a time
	overdueAfter = 100 * ms // past its promise
	newGrace     = time.Second
	probeFor     = 600 * ms
	helpFor      = 350 * ms
	rivalFor     = 900 * ms
	voteAge      = 3 * time.Second
	suspectFor   = 1500 * ms
	stallFor     = 10 * time.Second
	stallRound   = time.Second
	aloneAfter   = 3 * time.Second
	lastCallGap  = 150 * ms
	lastCalls    = 8
	floodBatch   = 2 * ms
	floodRate    = 200 // packets a second
	repairEvery  = time.Second
	retryRate    = 2.0 // pings a second, times the failed share of the table
	leaveFor     = time.Second
	streamFor    = 1800 * ms
	linkCount    = 2
	seedsMax     = 30 * time.Second
	lateBy       = 100 * ms // how much later than planned a wake-up may count

	maxDatagram = 1400
	maxFrame    = 32 << 10
	maxEvent    = 1024 // bytes of a user event's name and payload together
	maxEvents   = 128  // user events remembered
	maxMembers  = 1 << 14
	maxProbes   = 128
	maxQueue    = 4096 // updates waiting to be flooded
	maxOwed     = 8 << 20
	maxDials    = 64 // addresses tried in one join
)

// kind says what a message is.
type kind uint8

const (
	kHeartbeat kind = iota + 1
	kPing           // Target: answer me
	kAck            // I answer; Seq is the ping's
	kCheck          // look at Target for me
	kVote           // what I saw of Target
	kFlood          // carries updates; with a Seq it wants a kAck
	kLook           // first frame of a stream: who are you
	kWatch          // first frame: an idle link that tells of my death
	kExchange       // first frame: let us compare tables
	kWelcome        // answer to a first frame
	kConfirm        // the link stands
	kTable          // a piece of the table
	kBye            // this stream ends without anybody having died
)

// verdict is what one observer saw of a target, in rising weight as evidence
// that somebody is there.
type verdict uint8

const (
	vNone        verdict = iota
	vUnreachable         // nothing at all
	vRefused             // the host is there, the process is not
	vSilent              // the kernel accepts, the process does not answer
	vAlive
)

// head opens every datagram and every frame. gob leaves zero fields out, so one
// flat struct serves all kinds.
type head struct {
	Kind        kind
	From        string
	Incarnation uint64
	Raised      uint64 // Incarnation minus Born; 0 until something was refuted
	Digest      uint64
	Promise     uint32 // heartbeat: milliseconds until the next one to you
	Seq         uint32
	Target      string
	Verdict     verdict
	Nonce, Echo uint64 // streams: my challenge, and yours given back
	More        bool   // kTable: another piece follows
	// To is the low half of the receiver's Born, where updates follow: what was
	// said to a former run of an agent, and recorded, is nothing to this one.
	To uint32
}

func (h *head) born() uint64 { return h.Incarnation - h.Raised }

// update is one claim about a member or one user event (Event set).
type update struct {
	Name        string // of the member, or of the event's sender
	Addr        string // netip.AddrPort.MarshalBinary
	Incarnation uint64
	Raised      uint64
	Status      Status
	Tags        string
	Age         uint32 // seconds since the member died
	By          string // who suspects
	Event       string
	Payload     []byte
	LTime       uint64
	Coalesce    bool
}

// connID names a stream: positive ones are dialled by the node, negative ones
// were accepted.
type connID int64

// errRefused is what dialed is told when the host answered that nobody listens.
var errRefused = errors.New("connection refused")

type packet struct {
	to   netip.AddrPort
	name string // whose packet it is, for sealing
	data []byte
}

type streamOp struct {
	op   opKind
	id   connID
	to   netip.AddrPort // opDial
	data []byte         // opSend
}

type opKind uint8

const (
	opDial opKind = iota
	opSend
	opClose // after what was sent before has gone out
)

// joined is the end of one join attempt.
type joined struct {
	token int // as given to join
	ok    int
	errs  []string // "ADDR: reason"
}

// outputs is all that a node wants done, in order.
type outputs struct {
	packets []packet
	streams []streamOp
	events  []Event
	logs    []string
	joins   []joined
	resolve bool          // look the seeds up and call seedsResolved
	wake    time.Duration // when to tick next, on the caller's clock
	left    bool          // the leave is done
	fatal   error         // the node must not go on
}

// nodeConfig is what a node is born with.
type nodeConfig struct {
	Self      Member // Incarnation and Born: the start in Unix ms
	Seeds     []string
	RetryMax  int
	ReapAfter time.Duration
	Random    [32]byte
	Codec     *codec
}

// node is one member's view of the cluster and all its protocol state.
type node struct {
	nodeConfig
	rng  *rand.Rand
	t    *table
	self *entry
	out  outputs

	real, planned time.Duration // the caller's clock, and the wait it was asked for
	now           time.Duration // awake time: what all deadlines run on

	peers    map[string]*peer
	ringSeen uint64 // table version of the lists below
	lost     uint64 // shrink count at that time
	watchers []*target
	preds    []*peer
	nextBeat time.Duration
	beats    uint32

	probes  []*probe
	accused []*suspicion
	seq     uint32

	heard   time.Duration // last sign of anybody
	calls   int           // last-call rounds made
	callAt  time.Duration
	alone   bool
	queue   []flooding
	flushAt time.Duration
	tokens  float64
	tokenAt time.Duration

	streams  []*stream
	nextConn connID
	linkAt   time.Duration

	repairAt   time.Duration
	repairWith string
	repairSeen uint64 // the digest that differed

	retryAt       time.Duration
	retryAcc      float64
	failed, total int // members to retry, and all that could be
	reapAt        time.Duration

	clock  uint64 // Lamport time of user events
	recent []userEvent

	everJoined bool
	placed     bool // a seed has answered: it is known which address leads there
	seeds      seedState
	attempts   []*attempt
	rival      *rival
	outlived   Member // a namesake that was found gone
	leave      *leaving
}

// peer is the protocol's state about one member.
type peer struct {
	e        *entry
	due      time.Duration // awake time at which it is overdue; 0: not watched by me
	beat     uint32        // last heartbeat's Seq, against replays
	beatOf   uint64        // the instance it came from
	told     time.Duration // when it was last told what is believed of it
	stalled  time.Duration // since when it accepts without answering; 0: it does not
	tcpOnly  int           // looks in a row that only TCP answered
	pinged   uint32        // Seq of my last ping outside of a probe; 0: answered
	answered time.Duration // when it last gave a sign of life
	disputed time.Duration // since when another claims its name
	noLink   int           // watch links in a row that could not be had
	linkAt   time.Duration // when to try the next
}

// target is one of my watchers and by when it expects my next heartbeat.
type target struct {
	e  *entry
	by time.Duration
}

func newNode(cfg nodeConfig, now time.Duration) *node {
	n := &node{
		nodeConfig: cfg,
		rng:        rand.New(rand.NewChaCha8(cfg.Random)),
		t:          newTable(),
		peers:      make(map[string]*peer),
		real:       now,
		now:        time.Second, // so that 0 can mean never
		tokens:     floodRate / 10,
	}
	n.seq = n.rng.Uint32()
	cfg.Self.Status = StatusAlive
	n.t.apply(n.now, cfg.Self, 0)
	n.self = n.t.get(cfg.Self.Name)
	n.heard, n.nextBeat, n.tokenAt = n.now, n.now+n.jitter(beatEvery), n.now
	n.reapAt = n.now + n.reapEvery()
	return n
}

func (n *node) jitter(d time.Duration) time.Duration { return time.Duration(n.rng.Int64N(int64(d))) }

func (n *node) logf(format string, a ...any) {
	n.out.logs = append(n.out.logs, fmt.Sprintf(format, a...))
}

func (n *node) peer(e *entry) *peer {
	p := n.peers[e.Name]
	if p == nil {
		p = &peer{e: e}
		n.peers[e.Name] = p
	}
	return p
}

// advance runs the awake clock. A process that was stopped would blame
// everybody else for its own silence, so a gap counts for no more than the
// planned wait and a little.
func (n *node) advance(now time.Duration) {
	d := min(now-n.real, n.planned+lateBy)
	n.real = now
	n.now += max(d, 0)
}

// tick does everything that has fallen due. The caller must have handed in all
// that had arrived before (a queued heartbeat acquits its sender).
func (n *node) tick(now time.Duration) {
	n.advance(now)
	n.planned = time.Minute
	if n.leave != nil {
		n.stepLeave()
		n.stepStreams()
		n.flush()
		return
	}
	n.refreshRing()
	n.stepBeat()
	n.stepWatch()
	n.stepProbes()
	n.stepAccused()
	n.stepAlone()
	n.stepRival()
	n.stepStreams()
	n.stepLinks()
	n.stepRepair()
	n.stepRetry()
	n.stepSeeds()
	n.stepReap()
	if n.ringSeen != n.t.version {
		n.refreshRing()
		n.at(n.now) // links and retries follow the new ring in the next tick
	}
	n.flush()
}

// at asks to be woken at awake time t; 0 means never.
func (n *node) at(t time.Duration) {
	if t != 0 {
		n.planned = min(n.planned, max(t-n.now, 0))
	}
}

// take hands over all outputs since the last call.
func (n *node) take() outputs {
	n.out.wake = n.real + n.planned
	n.out.events = append(n.out.events, n.t.events...)
	n.t.events = nil
	o := n.out
	n.out = outputs{}
	return o
}

// ---- sending ----

func (n *node) head(k kind) head {
	h := head{Kind: k, From: n.self.Name, Incarnation: n.self.Incarnation, Raised: n.self.Incarnation - n.self.Born}
	switch k {
	case kHeartbeat, kPing, kAck, kExchange, kWelcome:
		h.Digest = n.digest()
	}
	return h
}

// digest covers the table and the remembered user events.
func (n *node) digest() uint64 {
	d := n.t.digest
	for i := range n.recent {
		d ^= n.recent[i].key
	}
	return d
}

func (n *node) send(e *entry, h head, updates ...[]byte) {
	if len(updates) > 0 && h.To == 0 {
		h.To = uint32(e.Born)
	}
	n.sendTo(e.Addr, e.Name, h, updates...)
}

func (n *node) sendTo(to netip.AddrPort, name string, h head, updates ...[]byte) {
	data := n.Codec.head(nil, &h)
	for _, u := range updates {
		data = append(data, u...)
	}
	n.out.packets = append(n.out.packets, packet{to, name, data})
}

func (n *node) nextSeq() uint32 {
	n.seq++
	if n.seq == 0 {
		n.seq = 1
	}
	return n.seq
}

// claim encodes what is believed of e.
func (n *node) claim(e *entry, by string) []byte {
	m := e.Member
	u := memberUpdate(m)
	u.By = by
	if m.Status.dead() {
		u.Age = uint32((n.now - e.since) / time.Second)
	}
	return n.Codec.update(nil, &u)
}

func memberUpdate(m Member) update {
	addr, _ := m.Addr.MarshalBinary()
	return update{Name: m.Name, Addr: string(addr), Incarnation: m.Incarnation,
		Raised: m.Incarnation - m.Born, Status: m.Status, Tags: string(m.Tags)}
}

// member checks a claim that came from outside.
func (u *update) member() (Member, error) {
	m := Member{Name: u.Name, Incarnation: u.Incarnation, Born: u.Incarnation - u.Raised, Status: u.Status, Tags: Tags(u.Tags)}
	if err := validName(u.Name); err != nil {
		return m, err
	}
	if err := m.Addr.UnmarshalBinary([]byte(u.Addr)); err != nil || !m.Addr.IsValid() || m.Addr.Port() == 0 ||
		m.Addr.Addr().IsUnspecified() || m.Addr.Addr().IsMulticast() || validName("%"+m.Addr.Addr().Zone()) != nil {
		return m, fmt.Errorf("bad address of %s", u.Name)
	}
	m.Addr = netip.AddrPortFrom(m.Addr.Addr().Unmap(), m.Addr.Port())
	if u.Raised > u.Incarnation || u.Incarnation > 1<<62 || len(u.Tags) > maxTags || len(u.By) > maxName {
		return m, fmt.Errorf("bad claim about %s", u.Name)
	}
	switch u.Status {
	case StatusAlive, StatusSuspect, StatusFailed, StatusLeft, StatusPruned:
		return m, nil
	}
	return m, fmt.Errorf("bad status of %s", u.Name)
}

// ---- datagrams in ----

// datagram takes one datagram, already opened. Bytes that do not decode are
// an error, for the caller to count.
func (n *node) datagram(now time.Duration, from netip.AddrPort, b []byte) error {
	n.advance(now)
	h, rest, err := n.Codec.readHead(b)
	if err != nil {
		return err
	}
	if h.From == n.self.Name && h.born() == n.self.Born {
		return nil // my own, sent back
	}
	n.heard = n.now
	switch h.Kind {
	case kPing:
		if h.Target == n.self.Name { // else it was meant for a former owner of this address
			n.answer(from, h, len(b))
		}
	case kAck:
		n.acked(h)
	case kCheck:
		n.asked(h)
	case kVote:
		n.voted(h)
	case kFlood:
		if h.Seq != 0 {
			n.answer(from, h, len(b))
		}
	case kHeartbeat:
	default:
		return fmt.Errorf("unexpected message kind %d", h.Kind)
	}
	n.contact(h)
	if h.To != 0 && h.To != uint32(n.self.Born) {
		return nil
	}
	for len(rest) > 0 {
		var u update
		if u, rest, err = n.Codec.readUpdate(rest); err != nil {
			return err
		}
		if err := n.learn(&u, h.From); err != nil {
			return err
		}
	}
	return nil
}

// answer acknowledges a datagram of size bytes. Its source may be forged, so
// that an answer is never larger: nobody can aim a member at somebody else.
func (n *node) answer(to netip.AddrPort, h head, size int) {
	a := n.head(kAck)
	a.Seq = h.Seq
	if len(n.Codec.head(nil, &a)) > size {
		a.Digest = 0
	}
	if len(n.Codec.head(nil, &a)) <= size {
		n.sendTo(to, h.From, a)
	}
}

// contact looks at who sent a datagram and whether it needs to be told
// something: that it is thought dead, or that our tables differ.
func (n *node) contact(h head) {
	e := n.t.get(h.From)
	if e == nil || e == n.self {
		return
	}
	if h.born() != e.Born || h.Incarnation < e.Incarnation {
		n.tell(e, h.born()) // a former or a rival instance, or one that missed its own news
		return
	}
	if h.Incarnation > e.Incarnation {
		// It lives and has refuted what I believe, and the refutation was lost.
		m := e.Member
		m.Incarnation, m.Status = h.Incarnation, StatusAlive
		n.adopt(m, &update{})
	}
	if e.Status != StatusAlive {
		n.tell(e, e.Born)
		return
	}
	p := n.peer(e)
	if h.Kind == kHeartbeat && (p.beatOf != e.Born || h.Seq > p.beat) {
		p.beat, p.beatOf, p.tcpOnly = h.Seq, e.Born, 0
		n.seen(e, time.Duration(h.Promise)*ms+overdueAfter)
	}
	if e.lost && h.Kind == kHeartbeat {
		n.ping(e) // I hear it; does it hear me?
	}
	if h.Digest != 0 && h.Digest != n.digest() && !e.lost {
		n.wantRepair(e, h.Digest)
	}
}

// tell sends e the claim that it should refute, at most five times a second
// and only to its known address (an answer to a forged packet goes nowhere).
func (n *node) tell(e *entry, born uint64) {
	if p := n.peer(e); n.leave == nil && (p.told == 0 || n.now-p.told >= 200*ms) {
		p.told = n.now
		h := n.head(kFlood)
		h.To = uint32(born)
		n.send(e, h, n.claim(e, n.self.Name))
	}
}

// seen notes a sign of life of e, whose next heartbeat is due in d.
func (n *node) seen(e *entry, d time.Duration) {
	p := n.peer(e)
	p.stalled, p.answered = 0, n.now
	if p.due != 0 {
		p.due = n.now + min(d, time.Minute)
	}
	if pr := n.probeOf(e); pr != nil {
		n.observed(pr, vAlive)
	}
}

// ---- rings and heartbeats ----

// refreshRing recomputes whom I watch and who watches me after a change.
func (n *node) refreshRing() {
	if n.ringSeen == n.t.version {
		return
	}
	// After a mass failure the rings must heal at once, so a new predecessor is
	// due soon. After a join nothing is broken, and everybody is busy.
	grace := newGrace
	if n.lost != n.t.shrunk {
		grace = overdueAfter
	}
	n.ringSeen, n.lost = n.t.version, n.t.shrunk
	n.failed, n.total = n.t.failed()
	old := n.watchers
	n.watchers = nil
	for _, w := range n.t.watchers(n.self) {
		i := slices.IndexFunc(old, func(o *target) bool { return o.e == w })
		if i >= 0 {
			n.watchers = append(n.watchers, old[i])
		} else {
			n.watchers = append(n.watchers, &target{e: w})
		}
	}
	for _, w := range n.watchers {
		if w.by == 0 {
			n.beat(w)
		}
	}
	var preds []*peer
	for _, e := range n.t.watched(n.self) {
		p := n.peer(e)
		if p.due == 0 {
			p.due = n.now + grace
		}
		preds = append(preds, p)
	}
	for _, p := range n.preds {
		if !slices.Contains(preds, p) {
			p.due = 0
		}
	}
	n.preds = preds
	n.linkAt = n.now
}

func (n *node) beat(w *target) {
	every := time.Duration(len(n.watchers)) * beatEvery
	w.by = n.now + every
	n.beats++
	h := n.head(kHeartbeat)
	h.Promise, h.Seq = uint32(every/ms), n.beats
	n.send(w.e, h)
}

// stepBeat sends the next heartbeat to the watcher whose promise ends first.
func (n *node) stepBeat() {
	if len(n.watchers) == 0 {
		return
	}
	if n.now >= n.nextBeat {
		n.beat(slices.MinFunc(n.watchers, func(a, b *target) int { return cmp.Compare(a.by, b.by) }))
		n.nextBeat = max(n.nextBeat+beatEvery, n.now+beatEvery/2)
	}
	n.at(n.nextBeat)
}

// stepWatch starts a probe of every predecessor that is overdue.
func (n *node) stepWatch() {
	for _, p := range n.preds {
		if p.due != 0 && n.now >= p.due && n.probeOf(p.e) == nil {
			n.startProbe(p.e)
		}
		if n.probeOf(p.e) == nil {
			n.at(p.due)
		}
	}
}

// ---- floods ----

// flooding is one update on its way to my watchers.
type flooding struct {
	key  string // a newer claim about a name replaces the older
	data []byte
}

func (n *node) flood(key string, data []byte) {
	if i := slices.IndexFunc(n.queue, func(f flooding) bool { return f.key == key }); i >= 0 {
		n.queue[i].data = data
		return
	}
	if len(n.queue) >= maxQueue {
		n.queue = slices.Delete(n.queue, 0, 1) // repair will carry it
	}
	n.queue = append(n.queue, flooding{key, data})
}

// flush sends the queue to all ring successors: at once when the line was
// idle, else in batches, and never more than floodRate packets a second.
func (n *node) flush() {
	n.tokens = min(n.tokens+floodRate*(n.now-n.tokenAt).Seconds(), floodRate/5)
	n.tokenAt = n.now
	if len(n.queue) == 0 || n.now < n.flushAt {
		if len(n.queue) > 0 {
			n.at(n.flushAt)
		}
		return
	}
	if len(n.watchers) == 0 {
		n.queue = nil // nobody to tell; whoever comes gets the table
		return
	}
	for len(n.queue) > 0 {
		if n.tokens < 0 {
			n.flushAt = n.now + time.Duration(-n.tokens/floodRate*float64(time.Second)) + ms
			n.at(n.flushAt)
			return
		}
		size, count := 0, 0
		for _, f := range n.queue {
			if size+len(f.data) > maxDatagram-256 && count > 0 {
				break
			}
			size += len(f.data)
			count++
		}
		var batch [][]byte
		for _, f := range n.queue[:count] {
			batch = append(batch, f.data)
		}
		n.queue = slices.Delete(n.queue, 0, count)
		for _, w := range n.watchers {
			n.send(w.e, n.head(kFlood), batch...)
			n.tokens--
		}
	}
	n.flushAt = n.now + floodBatch
}

// learn takes one flooded update and passes it on if it is news.
func (n *node) learn(u *update, via string) error {
	if u.Event != "" {
		return n.learnEvent(u, true)
	}
	m, err := u.member()
	if err != nil {
		return err
	}
	if m.Name == n.self.Name {
		n.aboutMe(m, u.By, via)
		return nil
	}
	e := n.t.get(m.Name)
	revived := e != nil && e.Status == StatusFailed && m.Status == StatusAlive && m.Name == via
	n.adopt(m, u)
	if revived && e.Status == StatusAlive && n.failed > 1 {
		n.exchange(e) // a split has ended: it knows of many more
	}
	return nil
}

// adopt applies a claim and floods it if it was news.
func (n *node) adopt(m Member, u *update) {
	if n.t.get(m.Name) == nil && len(n.t.ordered) >= maxMembers {
		return
	}
	if !n.t.apply(n.now, m, time.Duration(u.Age)*time.Second) {
		return
	}
	e := n.t.get(m.Name)
	if p := n.peers[m.Name]; p != nil && p.beatOf != e.Born {
		*p = peer{e: e, due: p.due, told: p.told, pinged: p.pinged} // what was seen of a former instance says nothing of this one
		if p.due != 0 {
			p.due = n.now + newGrace
		}
	}
	if n.everJoined || n.t.alive() <= 2 {
		n.flood(m.Name, n.claim(e, u.By))
	}
}

// userEvent is one remembered user event; recent holds the latest of them in
// the order of LTime, then key. Everybody who has heard the same events
// remembers the same ones, so they can be part of the digest.
type userEvent struct {
	ltime uint64
	key   uint64
	data  []byte
}

// eventKey tells user events apart.
func (u *update) eventKey() uint64 {
	return mix(u.LTime ^ ringHash(rings, u.Name+"\x00"+u.Event+"\x00"+string(u.Payload)))
}

func (n *node) learnEvent(u *update, deliver bool) error {
	if err := validName(u.Name); err != nil {
		return err
	}
	if len(u.Event)+len(u.Payload) > maxEvent || u.LTime == 0 || u.LTime > 1<<62 {
		return fmt.Errorf("bad user event of %s", u.Name)
	}
	n.clock = max(n.clock, u.LTime)
	ev := userEvent{u.LTime, u.eventKey(), nil}
	at, known := slices.BinarySearchFunc(n.recent, ev, func(a, b userEvent) int {
		return cmp.Or(cmp.Compare(a.ltime, b.ltime), cmp.Compare(a.key, b.key))
	})
	if known || at == 0 && len(n.recent) == maxEvents {
		return nil // heard before, or too old to be told from one that was
	}
	// Only what belongs to an event goes on: the rest may be of any length.
	ev.data = n.Codec.update(nil, &update{Name: u.Name, Event: u.Event, Payload: u.Payload, LTime: u.LTime, Coalesce: u.Coalesce})
	n.recent = slices.Insert(n.recent, at, ev)
	if len(n.recent) > maxEvents {
		n.recent = slices.Delete(n.recent, 0, 1)
	}
	if deliver {
		n.out.events = append(n.out.events, Event{Kind: EventUser, Name: u.Event, Payload: u.Payload, LTime: u.LTime, Coalesce: u.Coalesce})
		n.flood(fmt.Sprintf("\x00%x", ev.key), ev.data)
	}
	return nil
}

// userEvent sends a user event to everybody, this node included.
func (n *node) userEvent(now time.Duration, name string, payload []byte, coalesce bool) error {
	n.advance(now)
	switch {
	case name == "":
		return errors.New("the event has no name")
	case len(name)+len(payload) > maxEvent:
		return fmt.Errorf("event name and payload take %d bytes, the limit is %d", len(name)+len(payload), maxEvent)
	}
	return n.learnEvent(&update{Name: n.self.Name, Event: name, Payload: payload, LTime: n.clock + 1, Coalesce: coalesce}, true)
}
