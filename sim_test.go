// sim_test.go: a whole cluster in virtual time, and the stories that are played
// on it.
//
// Every node is the real core; what it puts out goes over a simulated wire as
// encoded bytes. There is one heap of (time, sequence) and one seeded random
// source, so that a seed gives the same run every time. Of TCP there is what a
// session of rpc.go makes of it: SYNs that get lost, refusals, accepts by a kernel
// whose process is stopped, frames that come late, ends that are told or not.

package main

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sealSize is what version, tag, nonce and seal add to a datagram.
const sealSize = 1 + 4 + 12 + 16

// sim is the world: the clock, the network, the hosts.
type sim struct {
	tb      testing.TB
	seed    uint64
	rng     *rand.Rand
	now     time.Duration
	seq     uint64
	queue   []simItem
	hosts   []*simHost
	procs   []*proc
	byBirth map[lifetime]*proc
	numbers map[string]int // of the names, in order of appearance

	loss      float64 // of each datagram and each SYN
	lat       [2]time.Duration
	regions   int              // hosts are spread over so many
	line      [2]time.Duration // one way between two regions
	oneWay    map[[2]int]bool  // host to host: nothing arrives
	reapAfter time.Duration
	wallShift time.Duration // what clocks of agents started from now on show too much

	hash        uint64 // of all that was delivered, when tracing
	tracing     bool
	verbose     bool
	packetTrace bool
	quiet       bool // do not keep observations

	reply     func(p *proc, ev Event) // what handlers make of a query
	seen      []observation
	excuse    func(observer, target *proc) bool // failed events that are not false
	falseFail int
	problems  []string
	checkAt   time.Duration

	packets, bytes int // sent by UDP
	frames         int

	busy time.Duration // how long a process may have to wait for its processor

	checked  bool // the scenario has ended, and check has looked at it
	resting  bool // there is nothing left to do but heartbeats
	promises map[promise]time.Duration
}

// promise is what one process has promised to another: the time of its next heartbeat.
type promise struct {
	by *proc
	to lifetime
}

// known is what a node has told of a name, and its highest incarnation.
type known struct {
	told eventKind
	inc  uint64
}

// observation is one member event at one node.
type observation struct {
	at time.Duration
	by *proc
	Event
}

type simHost struct {
	i     int
	place int // its region
	addr  netip.AddrPort
	up    bool // its link
	noTCP bool // a firewall refuses all connections to it
	group int  // hosts of different groups cannot talk
	p     *proc

	advertise netip.AddrPort        // what its agent says instead of addr
	filtered  bool                  // nothing that it has not dialled itself reaches it
	natted    bool                  // by UDP, only the hosts that it has just sent something reach it; by TCP, none
	sentTo    map[int]time.Duration // when, by host
}

type procState uint8

const (
	procRunning procState = iota
	procStopped           // SIGSTOP: the kernel goes on without it
	procDead
)

// proc is one run of an agent.
type proc struct {
	s         *sim
	host      *simHost
	name      string
	seeds     []netip.AddrPort
	n         *node
	state     procState
	inbox     []arrival
	datagrams int  // of those in the inbox
	scheduled bool // a run event is in the heap
	timer     time.Duration
	gen       uint64
	sessions  []*simSession
	links     map[lifetime]*simLink

	known   []known // by the number of the name
	user    map[string]int
	userAt  map[string]time.Duration
	from    map[string][]string // user events by sender, in order
	joins   []error             // the ends of join commands, by address; nil: it answered
	answers []Event
	asked   int // queries that reached it
	logs    []string
	left    bool
	fatal   error
}

// arrival is one thing that waits for a node's loop.
type arrival struct {
	from netip.AddrPort // of a datagram
	data []byte
	any  bool
	fn   func(n *node) // or what a session tells
}

type itemKind uint8

const (
	itemRun itemKind = iota
	itemWake
	itemPacket
	itemFunc
)

// simItem is small because the heap moves it about.
type simItem struct {
	at  time.Duration
	seq uint64
	*work
}

type work struct {
	kind itemKind
	p    *proc
	gen  uint64
	from *simHost
	to   Member
	data []byte
	fn   func()
}

var (
	errTimedOut = errors.New("connection timed out")
	errReset    = errors.New("connection reset by peer")
)

const (
	simWall    = 1_700_000_000_000 // Unix ms at virtual time 0
	simStart   = time.Hour         // no clock starts at 0
	simBacklog = 256               // datagrams that wait in a socket
)

func newSim(tb testing.TB, seed uint64) *sim {
	s := &sim{
		tb:        tb,
		seed:      seed,
		rng:       rand.New(rand.NewPCG(seed, 0x68616d6c6574)),
		now:       simStart,
		byBirth:   make(map[lifetime]*proc),
		numbers:   make(map[string]int),
		lat:       [2]time.Duration{ms / 10, ms / 2},
		oneWay:    make(map[[2]int]bool),
		reapAfter: 24 * time.Hour,
		verbose:   os.Getenv("SIM_TRACE") != "",

		packetTrace: os.Getenv("SIM_TRACE") == "2",
	}
	if tb != nil {
		tb.Cleanup(func() {
			if !s.checked { // no scenario can forget it
				s.check()
			}
			if tb.Failed() {
				tb.Logf("replay: SIM_SEED=%d go test -count=1 -run '^%s$' .   (SIM_TRACE=1 shows every event, 2 every packet)", baseSeed(), strings.ReplaceAll(tb.Name(), "/", "$/^"))
			}
		})
	}
	return s
}

// baseSeed is where all seeds of a test run come from.
func baseSeed() uint64 { return uint64(envInt("SIM_SEED", 1)) }

// seedFor gives each case of a test its own run.
func seedFor(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return mix(h.Sum64() ^ baseSeed())
}

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// ---- the heap ----

func (s *sim) push(at time.Duration, w *work) {
	s.seq++
	q := append(s.queue, simItem{max(at, s.now), s.seq, w})
	for i := len(q) - 1; i > 0; {
		up := (i - 1) / 4
		if !q[i].before(q[up]) {
			break
		}
		q[i], q[up] = q[up], q[i]
		i = up
	}
	s.queue = q
}

func (a simItem) before(b simItem) bool { return a.at < b.at || a.at == b.at && a.seq < b.seq }

func (s *sim) pop() simItem {
	q := s.queue
	top, last := q[0], len(q)-1
	q[0], q[last] = q[last], simItem{}
	q = q[:last]
	for i := 0; ; {
		first := i
		for c := 4*i + 1; c <= 4*i+4 && c < last; c++ {
			if q[c].before(q[first]) {
				first = c
			}
		}
		if first == i {
			break
		}
		q[i], q[first] = q[first], q[i]
		i = first
	}
	s.queue = q
	return top
}

// at calls fn at time t from now.
func (s *sim) after(d time.Duration, fn func()) { s.push(s.now+d, &work{kind: itemFunc, fn: fn}) }

// run lets d pass.
func (s *sim) run(d time.Duration) {
	end := s.now + d
	for len(s.queue) > 0 && s.queue[0].at <= end {
		it := s.pop()
		s.now = it.at
		if s.now >= s.checkAt {
			s.checkTables()
			s.checkAt = s.now + 5*time.Second*time.Duration(1+len(s.procs)/100)
		}
		s.step(it.work)
	}
	s.now = end
}

// until lets time pass in steps until cond holds, at most limit; it returns how
// long that took.
func (s *sim) until(limit, step time.Duration, cond func() bool) (time.Duration, bool) {
	start := s.now
	for !cond() {
		if s.now-start >= limit {
			return s.now - start, false
		}
		s.run(step)
	}
	return s.now - start, true
}

func (s *sim) step(w *work) {
	switch w.kind {
	case itemRun:
		w.p.scheduled = false
		w.p.run()
	case itemWake:
		w.p.woken(w.gen)
	case itemPacket:
		s.arrive(w.from, w.to, w.data)
	case itemFunc:
		w.fn()
	}
}

// latency is how long a packet takes from a to b.
func (s *sim) latency(a, b *simHost) time.Duration {
	way := s.lat
	if b != nil && a.place != b.place {
		way = s.line
	}
	return way[0] + time.Duration(s.rng.Int64N(int64(way[1]-way[0])))
}

func (s *sim) lost() bool { return s.loss > 0 && s.rng.Float64() < s.loss }

// lostTwice: a packet, or the answer to it, is lost.
func (s *sim) lostTwice() bool { return s.rng.Float64() < s.loss || s.lost() }

func (s *sim) note(kind byte, p *proc, data []byte) {
	if !s.tracing {
		return
	}
	h := s.hash ^ uint64(s.now)<<8 ^ uint64(kind) ^ ringHash(int(kind), p.name)
	for len(data) >= 8 {
		h = mix(h ^ binary.LittleEndian.Uint64(data))
		data = data[8:]
	}
	for _, b := range data {
		h = mix(h ^ uint64(b))
	}
	s.hash = mix(h)
}

// ---- hosts and processes ----

func (s *sim) host() *simHost {
	i := len(s.hosts)
	ip := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	h := &simHost{i: i, place: i % max(s.regions, 1), addr: netip.AddrPortFrom(ip, 7946), up: true}
	s.hosts = append(s.hosts, h)
	return h
}

func (s *sim) hostAt(a netip.AddrPort) *simHost {
	b := a.Addr().As4()
	if i := int(b[1])<<16 | int(b[2])<<8 | int(b[3]); b[0] == 10 && a.Port() == 7946 && i < len(s.hosts) {
		return s.hosts[i]
	}
	return nil
}

// reach reports whether packets of a get to b.
func (s *sim) reach(a, b *simHost) bool {
	return a == b || a.up && b.up && a.group == b.group && !s.oneWay[[2]int{a.i, b.i}]
}

// start runs an agent on h; it joins through seeds.
func (s *sim) start(h *simHost, name string, seeds ...*simHost) *proc {
	born := newInstanceID(uint64(simWall+(s.now+s.wallShift)/ms), s.rng.Uint64())
	self := Member{Name: name, Addr: cmp.Or(h.advertise, h.addr), Incarnation: born, Instance: born, Status: statusAlive}
	p := &proc{s: s, host: h, name: name, user: make(map[string]int), from: make(map[string][]string), userAt: make(map[string]time.Duration), links: make(map[lifetime]*simLink)}
	cfg := nodeConfig{member: self, reapAfter: s.reapAfter}
	for _, seed := range seeds {
		cfg.seeds = append(cfg.seeds, seed.addr.String())
		p.seeds = append(p.seeds, seed.addr)
	}
	for i := 0; i < len(cfg.random); i += 8 {
		binary.LittleEndian.PutUint64(cfg.random[i:], s.rng.Uint64())
	}
	p.n = newNode(cfg, s.now)
	if h.p != nil && h.p.state != procDead {
		panic("two agents on one host")
	}
	h.p = p
	s.procs = append(s.procs, p)
	s.byBirth[lifetime{name, born}] = p
	p.schedule(0)
	return p
}

// cluster starts n agents that know each other already, and lets them settle.
func (s *sim) cluster(n int) []*proc {
	first := len(s.procs)
	for range n {
		s.start(s.host(), fmt.Sprintf("n%05d", len(s.hosts)-1))
	}
	ps := s.procs[first:]
	model := &table{}
	var all []known
	for _, p := range ps {
		model.apply(time.Second, p.n.self.Member, 0).known = s.now
		s.number(p.name)
		all = append(all, known{eventJoin, p.n.self.Incarnation})
	}
	clone := cloner(model)
	for _, p := range ps {
		p.n.table = clone()
		p.n.self = p.n.table.get(p.name)
		p.n.joining.joinedAt = s.now
		p.known = slices.Clone(all)
	}
	s.run(4 * time.Second)
	s.packets, s.bytes, s.frames = 0, 0, 0
	return ps
}

// cloner makes copies of a table of living members, without its pending events.
func cloner(t *table) func() *table {
	var at [rings][]int // the place in ordered of each place on a ring
	for i, ring := range t.ring {
		for _, e := range ring {
			where, _ := t.index(e.Name)
			at[i] = append(at[i], where)
		}
	}
	return func() *table {
		c := *t
		slab := make([]entry, len(t.ordered)) // one object: the garbage collector has less to look at
		c.ordered, c.dead, c.events = make([]*entry, len(t.ordered)), nil, nil
		for i, e := range t.ordered {
			slab[i] = *e
			c.ordered[i] = &slab[i]
		}
		for i := range c.ring {
			c.ring[i] = make([]*entry, len(at[i]))
			for j, where := range at[i] {
				c.ring[i][j] = &slab[where]
			}
		}
		return &c
	}
}

func (p *proc) schedule(d time.Duration) {
	if !p.scheduled {
		p.scheduled = true
		p.s.push(p.s.now+d, &work{kind: itemRun, p: p})
	}
}

// put queues an arrival; a running loop takes it, and whatever else has come by
// then, a few microseconds later.
func (p *proc) put(in arrival) {
	if p.state == procDead {
		return
	}
	if in.fn == nil {
		if p.datagrams >= simBacklog {
			return
		}
		p.datagrams++
	}
	p.inbox = append(p.inbox, in)
	if p.state == procRunning {
		p.schedule(20*time.Microsecond + p.s.slow())
	}
}

// slow is how long a busy machine keeps a process waiting.
func (s *sim) slow() time.Duration {
	if s.busy == 0 {
		return 0
	}
	return time.Duration(s.rng.Int64N(int64(s.busy)))
}

// tell has the node's loop run fn.
func (p *proc) tell(fn func(n *node)) { p.put(arrival{fn: fn}) }

// run is one turn of the loop: all that arrived, a tick, then the outputs.
func (p *proc) run() {
	if p.state != procRunning {
		return
	}
	s, n := p.s, p.n
	inbox := p.inbox
	p.inbox, p.datagrams = nil, 0
	for _, in := range inbox {
		s.note('i', p, in.data)
		s.show(p, in)
		if in.fn == nil {
			in.fn = func(n *node) {
				if err := n.handleDatagram(in.from, in.data, in.any); err != nil {
					s.problem("%s: datagram of %s: %v", p.name, in.from, err)
				}
			}
		}
		n.step(s.now, in.fn)
	}
	p.carryOut(n.tick(s.now))
}

// show prints what arrives, with SIM_TRACE=2.
func (s *sim) show(p *proc, in arrival) {
	if !s.packetTrace || in.data == nil {
		return
	}
	var hdr header
	rest, _ := wire.decode(in.data, &hdr)
	text := fmt.Sprintf("%+v", hdr)
	us, _ := wire.decodeAll(rest)
	for _, u := range us {
		text += fmt.Sprintf(" | %s %v inc %d+%d %s", u.Member.Name, u.Member.Status, u.Member.Instance, u.Member.Incarnation-u.Member.Instance, u.Name)
	}
	s.logf("%s <- %s %s", p.name, in.from, text)
}

// do calls the node as an RPC would.
func (p *proc) do(fn func(n *node)) {
	if p.state != procRunning {
		panic("call to an agent that does not run")
	}
	p.n.step(p.s.now, fn)
	p.run()
}

func (p *proc) carryOut(o outputs) {
	s := p.s
	for _, pk := range o.packets {
		s.packets++
		s.bytes += len(pk.data)
		if len(pk.data) > maxDatagram-sealSize {
			s.problem("%s sends a datagram of %d bytes", p.name, len(pk.data))
		}
		s.push(s.now+s.latency(p.host, s.hostAt(pk.to.Addr)), &work{kind: itemPacket, from: p.host, to: pk.to, data: pk.data})
	}
	for _, l := range o.tcpProbes {
		limit, again := tcpProbeTimes(p.n.roundTripTo(l))
		s.look(p, l, 4, s.now+limit, again)
	}
	for _, m := range o.syncs {
		s.compare(p, m.Addr, &stateSync{roundTrip: p.n.roundTripTo(m)}, func(error) {})
	}
	if o.links != nil {
		p.relink(o.links)
	}
	if s.resting {
		s.checkResting(p, o)
	}
	for _, l := range logTexts(o.logs) {
		p.logs = append(p.logs, l)
		if s.verbose {
			s.logf("%s: %s", p.name, l)
		}
	}
	for _, ev := range o.events {
		p.event(ev)
	}
	for _, i := range o.seeds {
		s.after(ms/5, func() { p.trySeed(i) })
	}
	p.left, p.fatal = o.left, o.fatal
	p.checkSelf()
	if p.left || p.fatal != nil {
		p.die()
		return
	}
	p.arm(o.wake)
}

// arm sees to one wake-up at the latest word; timers are a little late.
func (p *proc) arm(wake time.Duration) {
	wake = max(wake, p.s.now)
	if p.timer == wake {
		return
	}
	p.gen++
	p.timer = wake
	p.s.push(wake+time.Duration(p.s.rng.Int64N(int64(100*time.Microsecond))), &work{kind: itemWake, p: p, gen: p.gen})
}

func (p *proc) woken(gen uint64) {
	if gen != p.gen {
		return
	}
	p.timer = 0
	if !p.scheduled {
		p.run()
	}
}

// die ends the process: its kernel closes what it had open.
func (p *proc) die() {
	p.state = procDead
	for _, c := range slices.Clone(p.sessions) {
		c.died(p)
	}
	p.inbox = nil
}

// crash is a kill -9.
func (s *sim) crash(ps ...*proc) {
	for _, p := range ps {
		p.die()
	}
}

// loseHost takes away a host with all that runs on it.
func (s *sim) loseHost(ps ...*proc) {
	for _, p := range ps {
		p.host.up = false
		p.state = procDead
	}
}

func (p *proc) stop() { p.state = procStopped }

func (p *proc) cont() {
	if p.state == procStopped {
		p.state = procRunning
		p.schedule(0)
	}
}

// split puts each list of processes into a group of its own.
func (s *sim) split(groups ...[]*proc) {
	for i, g := range groups {
		for _, p := range g {
			p.host.group = i + 1
		}
	}
}

func (s *sim) heal() {
	for _, h := range s.hosts {
		h.group, h.up = 0, true
	}
}

// ---- the network ----

func (s *sim) arrive(from *simHost, to Member, data []byte) {
	h := s.hostAt(to.Addr)
	if h == nil || !s.reach(from, h) || from != h && s.lost() || h.p == nil || !s.passesNAT(from, h) {
		return
	}
	if self := h.p.n.self; to.Name == self.Name && (to.Instance == 0 || to.Instance == self.Instance) { // else the seal does not open it
		h.p.put(arrival{from: from.addr, data: data, any: to.Instance == 0})
	}
}

// passesNAT reports whether a datagram of from passes the translator or filter in front of h.
func (s *sim) passesNAT(from, h *simHost) bool {
	if from.natted {
		from.sentTo[h.i] = s.now
	}
	at, ok := h.sentTo[from.i]
	if h.filtered && from != h {
		return false
	}
	return !h.natted || from == h || ok && s.now-at < 30*time.Second
}

// behindNAT makes a host one.
func (h *simHost) behindNAT() {
	h.natted = true
	h.sentTo = make(map[int]time.Duration)
}

// simSession is one TCP connection between a dialler and an acceptor.
type simSession struct {
	s        *sim
	end      [2]*proc
	deadline time.Duration // 0: an idle link has none
	failed   func(end int, err error)
	over     bool

	roundTrip time.Duration // that of the hellos
}

// dial plays a connect of p that is made once more after each of waits, with the kernel's own tries after 1, 3 and 7
// seconds. done gets a session, or errTimedOut or ECONNREFUSED.
func (s *sim) dial(p *proc, to netip.AddrPort, deadline time.Duration, done func(*simSession, error), again time.Duration) {
	h, over := s.hostAt(to), false
	finish := func(c *simSession, err error) {
		if !over && p.state != procDead {
			over = true
			done(c, err)
		}
	}
	attempt := func() {
		shut := h != nil && h != p.host && (h.natted || h.filtered)
		if over || p.state == procDead || h == nil || shut || !s.reach(p.host, h) || !s.reach(h, p.host) || p.host != h && s.lostTwice() {
			return
		}
		s.after(s.latency(h, p.host), func() {
			q := h.p
			if q == nil || q.state == procDead || h.noTCP {
				finish(nil, syscall.ECONNREFUSED)
				return
			}
			if !over {
				c := &simSession{s: s, end: [2]*proc{p, q}, deadline: deadline, failed: func(int, error) {}}
				p.sessions, q.sessions = append(p.sessions, c), append(q.sessions, c)
				finish(c, nil)
			}
		})
	}
	for _, at := range []time.Duration{0, again, 2 * again} {
		for _, kernel := range []time.Duration{0, time.Second, 3 * time.Second, 7 * time.Second} {
			if s.now+at+kernel < deadline {
				s.after(at+kernel+s.latency(p.host, h), attempt)
			}
		}
	}
	s.after(deadline-s.now, func() { finish(nil, errTimedOut) })
}

// close forgets a session without a word.
func (c *simSession) close() {
	c.over = true
	for _, p := range c.end {
		p.sessions = slices.DeleteFunc(p.sessions, func(o *simSession) bool { return o == c })
	}
}

// died: the kernel of p, whose process has ended, tells the other end.
func (c *simSession) died(p *proc) {
	end := 1
	if c.end[0] != p {
		end = 0
	}
	failed := c.failed
	c.close()
	c.deliver(end, 0, func() { failed(end, errReset) })
}

// send has fn called at an end when a frame gets there: its process must run. On
// a connection nothing gets lost, but a loss costs a retransmission.
func (c *simSession) send(end int, fn func(n *node)) {
	c.s.frames++
	failed := c.failed
	c.deliver(end, 0, func() {
		switch p := c.end[end]; {
		case c.over:
		case p.state == procDead:
			c.close()
			c.deliver(1-end, 0, func() { failed(1-end, errReset) })
		default:
			p.tell(func(n *node) {
				if !c.over {
					fn(n)
				}
			})
		}
	})
}

func (c *simSession) deliver(end, tries int, fn func()) {
	s, from, to := c.s, c.end[1-end].host, c.end[end].host
	d := s.latency(from, to)
	if s.lost() {
		d += max(200*ms, 4*d) // two round trips
	}
	s.after(d, func() {
		if s.reach(from, to) && s.reach(to, from) {
			fn()
		} else if tries < 10 {
			s.after(min(200*ms<<tries, 2*time.Minute), func() { c.deliver(end, tries+1, fn) })
		}
	})
}

// meet plays the hellos and the first frame: at the dialler, then gets the acceptor's reply.
func (c *simSession) meet(k msgKind, then func(n *node, w header, about []update)) {
	start, first := c.s.now, false
	c.send(1, func(*node) { // a hello
		c.s.after(frameTimeout, func() {
			if failed := c.failed; !first && !c.over { // the acceptor hangs up
				c.close()
				c.deliver(0, 0, func() { failed(0, errReset) })
			}
		})
		c.send(0, func(n *node) { // and one back
			c.roundTrip = c.s.now - start
			hdr := n.header(k)
			c.send(1, func(n *node) {
				first = true
				w, about := n.handshakeReply(hdr)
				c.send(0, func(n *node) {
					n.noteSessionRoundTrip(w.From, w.instance(), c.roundTrip)
					then(n, w, about)
				})
			})
		})
	})
}

func (s *sim) look(p *proc, m Member, tries int, deadline, again time.Duration) {
	s.dial(p, m.Addr, deadline, func(c *simSession, err error) {
		if err == nil {
			p.tell(func(n *node) { n.detector.handleTCPProbeResult(n, m, verdictSilent, header{}) })
			c.failed = func(end int, err error) {
				if end == 0 && s.now < deadline {
					p.tell(func(n *node) { n.detector.handleTCPProbeResult(n, m, verdictNone, header{}) })
					if tries > 1 {
						s.look(p, m, tries-1, deadline, again)
					}
				}
			}
			s.after(deadline-s.now, c.close)
			c.meet(msgTCPProbe, func(n *node, w header, _ []update) {
				c.close()
				n.detector.handleTCPProbeResult(n, m, verdictAlive, w)
			})
		} else if err == syscall.ECONNREFUSED {
			p.tell(func(n *node) { n.detector.handleTCPProbeResult(n, m, verdictRefused, header{}) })
		}
	}, again)
}

// simLink is a watch link that shall stand.
type simLink struct {
	m     Member
	c     *simSession
	tries int
	over  bool
}

func (p *proc) relink(links []Member) {
	wanted := make(map[lifetime]bool)
	for _, m := range links {
		k := lifetime{m.Name, m.Instance}
		if wanted[k] = true; p.links[k] == nil {
			p.links[k] = &simLink{m: m}
			p.keepLink(p.links[k])
		}
	}
	for k, l := range p.links {
		if wanted[k] {
			continue
		}
		delete(p.links, k)
		p.s.after(linkOverlap, func() {
			if l.over = true; l.c != nil { // a bye
				l.c.close()
			}
		})
	}
}

func (p *proc) keepLink(l *simLink) {
	s := p.s
	if l.over || p.state == procDead {
		return
	}
	ended := func(up bool) {
		if l.over {
			return
		}
		if l.tries++; up {
			l.tries = 0
		}
		tries := l.tries
		p.tell(func(n *node) { n.detector.linkEnded(n, l.m, tries) })
		s.after(min(time.Second<<min(max(tries-1, 0), 10), maxLinkWait), func() { p.keepLink(l) })
	}
	deadline := s.now + sessionTimeout
	s.dial(p, l.m.Addr, deadline, func(c *simSession, err error) {
		if err != nil {
			ended(false)
			return
		}
		l.c = c
		up := false
		c.failed = func(end int, err error) {
			if end == 0 {
				ended(up)
			} else if dialler := p.n.self.Member; up {
				c.end[1].tell(func(n *node) { n.detector.linkEnded(n, dialler, 0) })
			}
		}
		s.after(deadline-s.now, func() {
			if !up && !c.over {
				c.close()
				ended(false)
			}
		})
		c.meet(msgLink, func(n *node, w header, _ []update) {
			if up = true; w.From != l.m.Name || w.instance() != l.m.Instance {
				c.close()
				ended(true)
			}
		})
	}, redialAfter(p.n.roundTripTo(l.m)))
}

// compare plays an exchange of tables.
func (s *sim) compare(p *proc, to netip.AddrPort, sync *stateSync, done func(error)) {
	deadline, welcomed := s.now+sessionTimeout, false
	s.dial(p, to, deadline, func(c *simSession, err error) {
		if err != nil {
			done(err)
			return
		}
		finish := func(err error) {
			if !c.over {
				c.close()
				done(err)
			}
		}
		c.failed = func(end int, err error) {
			if end == 0 {
				done(err)
			}
		}
		s.after(deadline-s.now, func() {
			if !welcomed {
				finish(errTimedOut)
			}
		})
		s.after(deadline+frameTimeout-s.now, func() { finish(errTimedOut) })
		sync.peer.Addr = to
		c.meet(msgSync, func(n *node, w header, about []update) {
			welcomed = true
			sync.roundTrip = c.roundTrip
			y := &stateSync{peer: Member{Name: n.self.Name, Instance: n.self.Instance}, from: p.host.addr.Addr(), digest: n.digest()}
			s.welcomed(c, n, w, about, sync, y, finish)
		})
	}, redialAfter(sync.roundTrip))
}

func (s *sim) welcomed(c *simSession, n *node, w header, about []update, sync, y *stateSync, finish func(error)) {
	same := w.Digest == n.digest()
	switch err := n.handleWelcome(sync, w, about); {
	case err != nil:
		finish(err)
	case same:
		n.syncDone(sync)
		finish(nil)
	default:
		s.pieces(c, n, sync, y, finish)
	}
}

// pieces plays both tables, the dialler's first.
func (s *sim) pieces(c *simSession, n *node, sync, y *stateSync, finish func(error)) {
	s.say(c, n, sync, y, 1, finish, func(n *node) {
		s.say(c, n, y, sync, 0, finish, func(n *node) {
			n.syncDone(sync)
			s.say(c, n, sync, y, 1, finish, func(*node) { finish(nil) }) // the events that only the dialler has
		})
	})
}

// say sends the table of x, piece by piece, to end, where y is its counterpart, and then goes on there.
func (s *sim) say(c *simSession, n *node, sync, y *stateSync, end int, finish func(error), then func(n *node)) {
	frame, more := n.tableChunk(sync)
	c.send(end, func(n *node) {
		hdr, us := s.frame(frame)
		switch _, bad, err := n.mergeChunk(y, hdr, us); {
		case err != nil || bad > 0:
			finish(fmt.Errorf("%d bad records: %w", bad, err))
		case more:
			c.end[1-end].tell(func(n *node) { s.say(c, n, sync, y, end, finish, then) })
		default:
			then(n)
		}
	})
}

// frame decodes a piece of a table.
func (s *sim) frame(b []byte) (hdr header, us []update) {
	rest, err := wire.decode(b, &hdr)
	if err == nil {
		us, err = wire.decodeAll(rest)
	}
	if err != nil || len(b) > maxFrame {
		s.problem("a frame of %d bytes: %v", len(b), err)
	}
	return hdr, us
}

// join is a join command; its ends come to p.joins.
func (p *proc) join(to ...netip.AddrPort) {
	for _, a := range to {
		p.s.compare(p, a, &stateSync{joins: true, asked: true}, func(err error) { p.joins = append(p.joins, err) })
	}
}

// trySeed tries a seed that has one address, as rpc.go does.
func (p *proc) trySeed(i int) {
	sync := &stateSync{joins: true}
	p.s.compare(p, p.seeds[i], sync, func(err error) {
		var r seedResult
		r.add(Member{Name: sync.peer.Name, Addr: p.seeds[i]}, err)
		p.tell(func(n *node) { n.joining.handleSeedTried(n, i, r) })
	})
}

// ---- what is seen, and what must always hold ----

func (s *sim) logf(format string, a ...any) {
	fmt.Printf("%10.4f %s\n", (s.now - simStart).Seconds(), fmt.Sprintf(format, a...))
}

func (s *sim) problem(format string, a ...any) {
	if len(s.problems) < 20 {
		s.problems = append(s.problems, fmt.Sprintf("%.4f ", (s.now-simStart).Seconds())+fmt.Sprintf(format, a...))
	}
}

// event takes one event of p's node and checks that a member's events
// alternate: join, then failed or leave, then join.
func (p *proc) event(ev Event) {
	s := p.s
	if ev.kind == eventUser {
		p.user[ev.Name]++
		p.userAt[ev.Name] = s.now
		p.from[ev.Member.Name] = append(p.from[ev.Member.Name], ev.Name)
		s.note('u', p, []byte(ev.Name))
		return
	}
	if ev.kind == eventQuery {
		p.asked++
		switch {
		case s.reply != nil:
			s.reply(p, ev)
		case ev.Name != "load":
			p.tell(func(n *node) { n.queries.sendReply(n, ev, replyNothing, nil) })
		}
		return
	}
	if ev.kind == eventAnswer {
		p.answers = append(p.answers, ev)
		return
	}
	s.note('e', p, []byte(ev.Member.Name+ev.kind.String()))
	if s.verbose {
		s.logf("%s: %s %s %s inc=%d", p.name, ev.kind, ev.Member.Name, ev.Member.Addr.Addr(), ev.Member.Incarnation)
	}
	k := p.of(ev.Member.Name)
	was := k.told
	up := was == eventJoin || was == eventUpdate
	ok := false
	switch ev.kind {
	case eventJoin:
		ok = !up
	case eventUpdate, eventFailed:
		ok = up
	case eventLeave:
		ok = up || was == eventFailed
	case eventReap:
		ok = !up // or it was dead already when this node joined
	}
	if !ok {
		s.problem("%s: %s of %s after %s", p.name, ev.kind, ev.Member.Name, was)
	}
	k.told = ev.kind
	if !s.quiet {
		s.seen = append(s.seen, observation{s.now, p, ev})
	}
	if q := s.byBirth[lifetime{ev.Member.Name, ev.Member.Instance}]; ev.kind == eventFailed && q != nil && q.state != procDead {
		if s.excuse == nil || !s.excuse(p, q) {
			s.falseFail++
			s.problem("false failure: %s says that %s has failed", p.name, q.name)
		}
	}
}

func (s *sim) number(name string) int {
	i, ok := s.numbers[name]
	if !ok {
		i = len(s.numbers)
		s.numbers[name] = i
	}
	return i
}

func (p *proc) of(name string) *known {
	i := p.s.number(name)
	for len(p.known) <= i {
		p.known = append(p.known, known{})
	}
	return &p.known[i]
}

// checkSelf: a node never believes itself to be anything but alive, and its
// incarnation never falls.
func (p *proc) checkSelf() {
	e := p.n.table.get(p.name)
	if e != p.n.self || e.Status != statusAlive || e.local.isolated {
		p.s.problem("%s does not believe itself alive", p.name)
	}
	k := p.of(p.name)
	if e.Incarnation < k.inc {
		p.s.problem("%s lowered its incarnation", p.name)
	}
	k.inc = e.Incarnation
}

// checkTables: one entry a name, no incarnation falls, and what events told is
// what the table shows.
func (s *sim) checkTables() {
	for _, p := range s.procs {
		if p.state == procDead || len(p.n.table.events) > 0 {
			continue // the latter: it has not had its first turn
		}
		last := ""
		for _, e := range p.n.table.ordered {
			if e.Name <= last {
				s.problem("%s: entries %s and %s", p.name, last, e.Name)
			}
			last = e.Name
			k := p.of(e.Name)
			if e.Incarnation < k.inc {
				s.problem("%s: the incarnation of %s fell", p.name, e.Name)
			}
			k.inc = e.Incarnation
			if e.local.reaped {
				continue
			}
			var want Status
			switch k.told {
			case eventJoin, eventUpdate:
				want = statusAlive
			case eventFailed:
				want = statusFailed
			case eventLeave:
				want = statusLeft
			}
			if v := e.displayStatus(); v != want && !(want == 0 && v.isDead()) && v != statusPruned {
				s.problem("%s: events left %s %v, the table has it %v", p.name, e.Name, want, v)
			}
		}
	}
}

// check ends a scenario: all that must always hold has held, and the cluster comes to rest.
func (s *sim) check() {
	s.tb.Helper()
	s.checked = true
	s.checkTables()
	s.checkFlaps()
	s.atRest()
	for _, p := range s.problems {
		s.tb.Errorf("%s", p)
	}
}

const (
	restAfter   = 20 * time.Second // the last fault
	restFor     = 6 * time.Second  // it is looked at
	restPackets = 2.2              // a second and member: a heartbeat each half second, and a little
	maxFailures = 3                // of one member that another is told in a minute
)

// atRest ends all faults, waits, and then finds nothing but heartbeats, and pings to those that have failed: whatever
// came before, no promise is broken, no member is probed, no tables are compared, and nothing is logged.
func (s *sim) atRest() {
	s.loss, s.busy = 0, 0
	clear(s.oneWay)
	for _, h := range s.hosts {
		h.group = 0
		h.up = h.p == nil || h.p.state != procDead // a lost host stays lost
	}
	for _, p := range s.procs {
		p.cont()
	}
	s.run(restAfter)

	s.packets, s.resting, s.promises = 0, true, make(map[promise]time.Duration)
	s.run(restFor)
	s.resting = false
	for of, at := range s.promises {
		if at+overdueAfter/2 < s.now {
			s.problem("at rest: %s has not sent %s what it promised", of.by.name, of.to.name)
		}
	}
	allowed := 0.0
	for _, p := range s.running() {
		allowed += restPackets + retryRate*float64(p.n.table.failed)/float64(p.n.table.total)
	}
	if per := float64(s.packets) / restFor.Seconds(); per > allowed {
		s.problem("at rest: %.1f packets a second of %d members, %.1f are allowed", per, len(s.running()), allowed)
	}
}

// checkResting finds what p does although there is nothing to do.
func (s *sim) checkResting(p *proc, o outputs) {
	for _, l := range logTexts(o.logs) { // each probe and each comparison of tables is one, too
		s.problem("at rest: %s logs %s", p.name, l)
	}
	for _, m := range o.tcpProbes {
		s.problem("at rest: %s looks at %s", p.name, m.Name)
	}
	for _, pk := range o.packets {
		var hdr header
		if _, err := wire.decode(pk.data, &hdr); err != nil || hdr.Kind != msgHeartbeat {
			continue
		}
		of := promise{p, lifetime{pk.to.Name, pk.to.Instance}}
		if at, ok := s.promises[of]; ok && at+overdueAfter/2 < s.now {
			s.problem("at rest: %s keeps a promise to %s %v late", p.name, pk.to.Name, s.now-at)
		}
		s.promises[of] = s.now + time.Duration(hdr.Promise)*ms
	}
}

// checkFlaps finds members of which others were told again and again that they have failed.
func (s *sim) checkFlaps() {
	type pair struct {
		by   *proc
		name string
	}
	failures := make(map[pair][]time.Duration)
	for _, o := range s.seen {
		if o.kind != eventFailed {
			continue
		}
		of := pair{o.by, o.Member.Name}
		recent := slices.DeleteFunc(failures[of], func(at time.Duration) bool { return at < o.at-time.Minute })
		if failures[of] = append(recent, o.at); len(failures[of]) == maxFailures+1 {
			s.problem("%s is told %d failures of %s in a minute", o.by.name, maxFailures+1, o.Member.Name)
		}
	}
}

// running lists the processes that run (or are only stopped).
func (s *sim) running() []*proc {
	var ps []*proc
	for _, p := range s.procs {
		if p.state != procDead {
			ps = append(ps, p)
		}
	}
	return ps
}

// shows is the status that p shows for name; 0: it does not know it.
func (p *proc) shows(name string) Status {
	if e := p.n.table.get(name); e != nil && !e.local.reaped && e.Status != statusPruned {
		return e.displayStatus()
	}
	return 0
}

// all reports whether every process of ps other than the member itself shows
// status for name.
func all(ps []*proc, name string, status Status) bool {
	for _, p := range ps {
		if p.state != procDead && p.name != name && p.shows(name) != status {
			return false
		}
	}
	return true
}

// agree reports whether every running node shows as alive exactly those that run.
func (s *sim) agree() bool {
	ps := s.running()
	for _, p := range ps {
		alive := 0
		for _, e := range p.n.table.ordered {
			if e.displayStatus() == statusAlive && !e.local.reaped {
				if q := s.byBirth[lifetime{e.Name, e.Instance}]; q == nil || q.state == procDead || q.n.self.Incarnation != e.Incarnation {
					return false
				}
				alive++
			}
		}
		if alive != len(ps) {
			return false
		}
	}
	return true
}

// times returns when events of a kind about name were seen since from.
func (s *sim) times(kind eventKind, name string, from time.Duration) []time.Duration {
	var ds []time.Duration
	for _, o := range s.seen {
		if o.kind == kind && o.Member.Name == name && o.at >= from && o.by.name != name {
			ds = append(ds, o.at-from)
		}
	}
	return ds
}

func percentile(ds []time.Duration, q float64) time.Duration {
	if len(ds) == 0 {
		return -1
	}
	ds = slices.Clone(ds)
	slices.Sort(ds)
	return ds[min(int(q*float64(len(ds))), len(ds)-1)]
}

// report plays the usual troubles one after the other and notes the figures.
type report struct {
	s      *sim
	rows   [][]string
	missed int // members that did not get to know something

	spread, first, all time.Duration // events p99; the first row of deaths: first p50, all p99
}

func (r *report) row(what string, format string, a ...any) {
	r.rows = append(r.rows, []string{what, fmt.Sprintf(format, a...)})
}

func (r *report) String() string {
	var b strings.Builder
	for _, row := range r.rows {
		fmt.Fprintf(&b, "%-22s %s\n", row[0], row[1])
	}
	return b.String()
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e6) }

func quantiles(ds []time.Duration) string {
	return fmt.Sprintf("p50 %9s  p99 %9s  max %9s ms", millis(percentile(ds, .5)), millis(percentile(ds, .99)), millis(percentile(ds, 1)))
}

func (r *report) idle(d time.Duration) {
	s := r.s
	s.packets, s.bytes, s.frames = 0, 0, 0
	s.run(d)
	per := float64(len(s.running())) * d.Seconds()
	r.row("idle, a member", "%.2f packets/s  %.0f bytes/s  %.3f frames/s", float64(s.packets)/per, float64(s.bytes)/per, float64(s.frames)/per)
}

func (r *report) userEvents(count int) {
	s := r.s
	var ds []time.Duration
	for i := range count {
		ps := s.running()
		name, from := fmt.Sprint("event", i), s.now
		ps[s.rng.IntN(len(ps))].do(func(n *node) { n.userEvent(name, []byte("payload"), false) })
		s.run(3 * time.Second)
		for _, p := range ps {
			if p.user[name] != 1 {
				r.missed++
			} else {
				ds = append(ds, p.userAt[name]-from)
			}
		}
	}
	r.spread = percentile(ds, .99)
	r.row(fmt.Sprint(count, " user events"), "%s", quantiles(ds))
}

// deaths lets members die one by one.
func (r *report) deaths(how string, count int, kill func(...*proc)) {
	s := r.s
	var first, all []time.Duration
	for range count {
		ps := s.running()
		v, from := ps[s.rng.IntN(len(ps))], s.now
		kill(v)
		s.until(15*time.Second, 100*ms, s.allFailed([]*proc{v}))
		s.run(time.Second)
		ts := s.times(eventFailed, v.name, from)
		r.missed += len(ps) - 1 - len(ts)
		first, all = append(first, percentile(ts, 0)), append(all, ts...)
	}
	if r.all == 0 {
		r.first, r.all = percentile(first, .5), percentile(all, .99)
	}
	r.row(fmt.Sprint(count, " x ", how, ", first"), "%s", quantiles(first))
	r.row(fmt.Sprint(count, " x ", how, ", all"), "%s", quantiles(all))
}

// mass lets a share of the members die at the same moment.
func (r *report) mass(how string, share float64, kill func(...*proc)) {
	s := r.s
	ps := s.running()
	var dead []*proc
	for _, i := range s.rng.Perm(len(ps))[:int(share*float64(len(ps)))] {
		dead = append(dead, ps[i])
	}
	s.quiet = true // nobody asks for these times
	kill(dead...)
	d, ok := s.until(15*time.Second, 50*ms, s.allFailed(dead))
	if !ok {
		r.missed++
	}
	s.quiet = false
	r.row(how+" at once, all", "%s ms", millis(d))
}

// simEntry is what an entry of a member in the table of another takes, with
// the garbage collector's share.
const simEntry = 190

// freeMemory asks the kernel; where it does not tell, there is enough.
func freeMemory() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return math.MaxUint64
	}
	_, rest, _ := strings.Cut(string(b), "MemAvailable:")
	kb, err := strconv.ParseUint(strings.Fields(rest + " x")[0], 10, 64)
	if err != nil {
		return math.MaxUint64
	}
	return kb << 10
}

// TestSimulation runs a big cluster and prints its figures: set SIM_N, and
// SIM_SEED and SIM_LOSS (in percent) if wanted.
func TestSimulation(t *testing.T) {
	n := envInt("SIM_N", 0)
	if n == 0 {
		t.Skip("SIM_N is not set")
	}
	if need := uint64(n) * uint64(n) * simEntry; need > freeMemory() {
		t.Fatalf("N=%d takes about %d MB of memory, %d MB are free", n, need>>20, freeMemory()>>20)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(25)) // tables of N x N entries, and little else
	began := time.Now()
	s := newSim(t, baseSeed())
	s.loss = float64(envInt("SIM_LOSS", 0)) / 100
	s.cluster(n)
	r := &report{s: s}
	r.row("cluster", "N=%d seed=%d loss=%v%%", n, s.seed, s.loss*100)
	r.idle(30 * time.Second)
	r.userEvents(10)
	r.deaths("kill -9", 10, s.crash)
	r.deaths("host lost", 3, s.loseHost)
	r.mass("10 % killed", .1, s.crash)
	r.row("false failures", "%d", s.falseFail)
	r.row("missed by somebody", "%d", r.missed)
	r.row("time", "%v simulated in %v", (s.now - simStart).Round(time.Second), time.Since(began).Round(time.Second))
	fmt.Print(r)
	s.check()
}

// ---- the simulator's own tests ----

func TestClusterJoinsAndNoticesAKill(t *testing.T) {
	for _, n := range []int{2, 3, 10, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			s := newSim(t, seedFor(t.Name()))
			first := s.start(s.host(), "n00000")
			s.run(time.Second)
			for i := 1; i < n; i++ {
				s.start(s.host(), fmt.Sprintf("n%05d", i), first.host)
				s.run(10 * ms)
			}
			d, ok := s.until(5*time.Second, ms, s.agree)
			t.Logf("converged %v after the last start", d)
			if !ok {
				t.Fatal("did not converge")
			}
			s.run(5 * time.Second)
			victim := s.procs[n/2]
			s.crash(victim)
			from := s.now
			d, ok = s.until(10*time.Second, ms, func() bool { return all(s.procs, victim.name, statusFailed) })
			ts := s.times(eventFailed, victim.name, from)
			t.Logf("kill: first %v p50 %v all %v (until: %v)", percentile(ts, 0), percentile(ts, .5), percentile(ts, 1), d)
			if !ok {
				t.Error("not everybody noticed")
			}
			s.check()
		})
	}
}

func TestSimulationOfOneSeedIsOneRun(t *testing.T) {
	play := func(seed uint64) (uint64, int) {
		s := newSim(t, seed)
		s.tracing, s.loss = true, 0.1
		s.excuse = func(*proc, *proc) bool { return true }
		ps := s.cluster(30)
		s.start(s.host(), "late", ps[3].host, ps[4].host)
		s.run(time.Second)
		s.crash(ps[1], ps[2])
		ps[5].stop()
		s.after(3*time.Second, ps[5].cont)
		ps[7].do(func(n *node) { n.userEvent("deploy", []byte("x"), false) })
		s.split(ps[:10], ps[10:])
		s.run(8 * time.Second)
		s.heal()
		s.run(5 * time.Second)
		return s.hash, len(s.seen)
	}
	a, events := play(baseSeed())
	if b, _ := play(baseSeed()); a != b {
		t.Errorf("two runs of seed %d differ: %x and %x", baseSeed(), a, b)
	}
	if c, _ := play(baseSeed() + 1); a == c {
		t.Error("another seed gives the same run")
	}
	t.Logf("hash %x, %d events", a, events)
}

// ---- stories ----

// The decisions of the protocol, and the story that goes wrong without each:
//
//	small clusters watch each other .......... TestRingOfASmallClusterMakesAllWatchAll
//	rings heal at once, suspects are skipped . TestFailureOfMostHostsIsNoticedByTheOthers
//	predecessors come from the table ......... TestFailureOfMostHostsIsNoticedByTheOthers
//	the hello carries the incarnation ........ TestRestartThatJoinsNobodyIsAFailure
//	dial again at 150 and 300 ms ............. TestStallOfAMemberIsNotCalledADeath (20 % loss)
//	late votes count ......................... TestNetworkThatIsSlowIsNotADeadOne
//	the end of a link is only evidence ....... TestRestOfAnIdleClusterIsQuiet, and most others
//	two observers ............................ TestIsolationIsBlamedOnNobodyElse
//	time to contradict ....................... TestBlackoutThatIsShortFailsNobody
//	accepted but silent is not dead .......... TestStallOfAMemberIsNotCalledADeath
//	deadlines run on awake time .............. TestSuspendedMachinesTogetherFailNobody
//	queues are drained before judging ........ TestProbesOfAMemberThatIsStoppedAgainAndAgainFailNobody
//	marks of a lonely node stay with it ...... TestIsolationIsBlamedOnNobodyElse
//	failed in a table is only doubted ........ TestSplitHeals
//	the dead are told, and retried ........... TestSplitHeals
//	digests start a repair ................... TestEventsArriveOnceDespiteLoss

// cases plays a story at every size and loss.
func cases(t *testing.T, sizes []int, losses []float64, play func(t *testing.T, s *sim, ps []*proc)) {
	for _, n := range sizes {
		if n > 10 && underRace() {
			continue // one goroutine, so nothing for the race detector to find
		}
		for _, loss := range losses {
			t.Run(fmt.Sprintf("N=%d,loss=%v%%", n, loss*100), func(t *testing.T) {
				s := newSim(t, seedFor(t.Name()))
				s.loss = loss
				play(t, s, s.cluster(n))
				s.check()
			})
		}
	}
}

// simSeeds is how many seeds a story is played with: SIM_SEEDS, or count. One goroutine plays it, so that the race
// detector has nothing to find in a second one.
func simSeeds(count int) int {
	if underRace() {
		count = 1
	}
	return envInt("SIM_SEEDS", count)
}

// within waits until cond holds and fails the test if that takes too long.
func (s *sim) within(limit time.Duration, what string, cond func() bool) time.Duration {
	s.tb.Helper()
	step := ms
	if len(s.procs) > 200 {
		step = 10 * ms
	}
	d, ok := s.until(limit, step, cond)
	if ok {
		s.tb.Logf("%s: after %v", what, d)
	} else {
		s.tb.Errorf("%s: not within %v", what, limit)
	}
	return d
}

// atMost fails the test when d is above limit.
func atMost(t *testing.T, what string, d, limit time.Duration) {
	t.Helper()
	if d > limit || d < 0 {
		t.Errorf("%s took %v, at most %v is wanted", what, d.Round(ms/10), limit)
	}
}

func apart(o, q *proc) bool { return o.host.group != q.host.group || o.host.up != q.host.up }

func others(ps []*proc, but ...*proc) []*proc {
	var os []*proc
next:
	for _, p := range ps {
		for _, b := range but {
			if p == b {
				continue next
			}
		}
		os = append(os, p)
	}
	return os
}

// everybody says that the victims are failed.
func (s *sim) allFailed(victims []*proc) func() bool {
	return func() bool {
		for _, v := range victims {
			if !all(s.procs, v.name, statusFailed) {
				return false
			}
		}
		return true
	}
}

func TestFailureOfAKilledMemberIsNoticedByAll(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		kills := min(len(ps)-1, 8)
		var first, every []time.Duration
		for i := range kills {
			v := ps[(i*37+len(ps)/2)%len(ps)]
			for v.state == procDead {
				v = ps[s.rng.IntN(len(ps))]
			}
			from := s.now
			s.crash(v)
			s.until(20*time.Second, 20*ms, s.allFailed([]*proc{v}))
			ts := s.times(eventFailed, v.name, from)
			if len(ts) != len(s.running()) {
				t.Fatalf("%d of %d noticed", len(ts), len(s.running()))
			}
			first, every = append(first, percentile(ts, 0)), append(every, ts...)
			s.run(3 * time.Second)
		}
		t.Logf("first p50 %v, all p50 %v p99 %v max %v", percentile(first, .5), percentile(every, .5), percentile(every, .99), percentile(every, 1))
		switch {
		case len(ps) <= 5: // the last of them has nobody to ask
			atMost(t, "noticing", percentile(every, 1), 3*time.Second)
		case s.loss == 0:
			atMost(t, "noticing first", percentile(first, .5), 50*ms)
			atMost(t, "noticing by all", percentile(every, .99), 500*ms)
		default:
			atMost(t, "noticing first", percentile(first, .5), 250*ms)
			atMost(t, "noticing by all", percentile(every, .99), 3*time.Second)
		}
	})
}

func TestFailureOfALostHostIsNoticedByAll(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		from := s.now
		s.loseHost(v)
		s.until(20*time.Second, 10*ms, s.allFailed([]*proc{v}))
		ts := s.times(eventFailed, v.name, from)
		t.Logf("first %v, all %v", percentile(ts, 0), percentile(ts, 1))
		if len(ts) != len(ps)-1 {
			t.Fatalf("%d of %d noticed", len(ts), len(ps)-1)
		}
		atMost(t, "noticing", percentile(ts, 1), 3*time.Second+time.Duration(s.loss*float64(25*time.Second)))
	})
}

func TestIsolationIsBlamedOnNobodyElse(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		s.excuse = func(o, q *proc) bool { return o == v || q == v }
		v.host.up = false
		s.within(5*time.Second, "it says so of all others", func() bool {
			for _, p := range others(ps, v) {
				if v.shows(p.name) != statusFailed {
					return false
				}
			}
			return true
		})
		s.within(4*time.Second, "all say so of it", s.allFailed([]*proc{v}))
		s.run(20 * time.Second)
		s.excuse = nil
		v.host.up = true
		s.within(s.healing(), "all alive again", s.agree)
		s.run(20 * time.Second)
		for _, p := range others(ps, v) {
			if s.loss == 0 && len(ps) > 2 && p.n.self.Incarnation != p.n.self.Instance {
				t.Errorf("%s had to refute what the lonely one believed", p.name)
			}
		}
	})
}

// healing is how long the way back may take.
func (s *sim) healing() time.Duration {
	if s.loss > .1 {
		return 4 * time.Second
	}
	return 2 * time.Second
}

func TestStallOfAMemberIsNotCalledADeath(t *testing.T) {
	t.Parallel()
	for _, stall := range []int{2, 5, 8} {
		t.Run(fmt.Sprintf("%ds", stall), func(t *testing.T) {
			cases(t, []int{2, 3, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
				ps[1].stop()
				s.run(time.Duration(stall) * time.Second)
				ps[1].cont()
				s.run(20 * time.Second)
				if len(s.seen) > len(ps) {
					t.Errorf("%d events", len(s.seen))
				}
			})
		})
	}
}

// A machine that is suspended gets nothing while it sleeps and finds minutes gone.
func TestSuspendedMachineBlamesNobody(t *testing.T) {
	for _, nap := range []time.Duration{2 * time.Second, 30 * time.Second, 5 * time.Minute} {
		t.Run(nap.String(), func(t *testing.T) {
			cases(t, []int{3, 10, 30}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[1]
				s.excuse = func(o, q *proc) bool { return q == v }
				s.run(time.Duration(s.rng.Int64N(int64(time.Second))))
				v.host.up = false
				v.stop()
				s.run(nap)
				v.host.up = true
				v.cont()
				s.within(s.healing(), "all alive", s.agree)
				s.run(20 * time.Second)
			})
		})
	}
}

// A laptop is closed with a whole cluster on it, or half of one; its agents go
// on one after the other.
func TestSuspendedMachinesTogetherFailNobody(t *testing.T) {
	for _, nap := range []time.Duration{4 * time.Second, 15 * time.Second, time.Hour} {
		t.Run(nap.String(), func(t *testing.T) {
			cases(t, []int{2, 3, 10, 50}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				for range 5 {
					for _, p := range ps {
						s.after(time.Duration(s.rng.Int64N(int64(time.Second))), p.stop)
						s.after(nap+time.Duration(s.rng.Int64N(int64(3*time.Second))), p.cont)
					}
					s.run(nap + 8*time.Second)
				}
				if !s.agree() {
					t.Error("not all alive")
				}
			})
		})
	}
}

func TestBlackoutThatIsShortFailsNobody(t *testing.T) {
	t.Parallel()
	cases(t, []int{2, 3, 10, 100}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		for range 20 {
			h := ps[s.rng.IntN(len(ps))].host
			h.up = false
			s.run(1800 * ms)
			h.up = true
			s.run(2*time.Second + time.Duration(s.rng.Int64N(int64(time.Second))))
		}
	})
}

func TestStallThatLastsFailsAMemberThatComesBack(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = func(o, q *proc) bool { return q == ps[1] }
		ps[1].stop()
		s.run(12 * time.Second)
		if s.loss > 0 {
			s.run(12 * time.Second) // a member that misses the broadcast waits for its own ten seconds
		}
		if !all(others(ps, ps[1]), ps[1].name, statusFailed) {
			t.Error("not everybody has it as failed")
		}
		s.excuse = nil
		ps[1].cont()
		s.within(s.healing(), "all alive again", s.agree)
		s.run(20 * time.Second)
	})
}

func TestRestOfAnIdleClusterIsQuiet(t *testing.T) {
	t.Parallel()
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		minutes := 10
		if s.loss != .05 && len(ps) == 100 {
			minutes = 3
		}
		s.run(time.Duration(minutes) * time.Minute)
		per := float64(len(ps)) * float64(minutes) * 60
		t.Logf("%d false failures; %.2f packets, %.0f bytes, %.3f frames a member and second", s.falseFail,
			float64(s.packets)/per, float64(s.bytes)/per, float64(s.frames)/per)
		if s.loss == 0 && s.bytes > int(180*per) {
			t.Error("an idle member sends more than 180 bytes a second")
		}
	})
}

// Where so many die, most of the dead have lost all their watchers.
func TestFailureOfMostHostsIsNoticedByTheOthers(t *testing.T) {
	cases(t, []int{20, 100}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		var dead []*proc
		for _, i := range s.rng.Perm(len(ps))[:len(ps)*4/5] {
			dead = append(dead, ps[i])
		}
		s.loseHost(dead...)
		s.within(12*time.Second+time.Duration(s.loss*float64(100*time.Second)), "all show all dead as failed", s.allFailed(dead))
		s.run(10 * time.Second)
	})
}

func TestFailureOfManyIsNoticedByAll(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"killed", "hosts lost"} {
		t.Run(what, func(t *testing.T) {
			cases(t, []int{10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
				var dead []*proc
				for _, i := range s.rng.Perm(len(ps))[:len(ps)*3/10] {
					dead = append(dead, ps[i])
				}
				limit := time.Second
				if what == "killed" {
					s.crash(dead...)
				} else {
					s.loseHost(dead...)
					limit = 4 * time.Second
				}
				s.within(limit+time.Duration(s.loss*float64(50*time.Second)), "all show all dead as failed", s.allFailed(dead))
				s.run(10 * time.Second)
			})
		})
	}
}

func TestRingOfASmallClusterMakesAllWatchAll(t *testing.T) {
	for n := 2; n <= rings+1; n++ {
		for i := range 20 {
			s := newSim(t, seedFor(fmt.Sprint(t.Name(), n, i)))
			for range 100 * i { // other names, other places on the rings
				s.host()
			}
			for _, p := range s.cluster(n) {
				if len(p.n.heartbeats.watchers) != n-1 || len(p.n.heartbeats.watched) != n-1 {
					t.Errorf("of %d, %s has %d watchers and watches %d", n, p.name, len(p.n.heartbeats.watchers), len(p.n.heartbeats.watched))
				}
			}
			s.check()
		}
	}
}

// Helpers answer after the prober has concluded; their votes must still count.
func TestNetworkThatIsSlowIsNotADeadOne(t *testing.T) {
	cases(t, []int{2, 3, 10, 50}, []float64{0, .02}, func(t *testing.T, s *sim, ps []*proc) {
		s.lat = [2]time.Duration{90 * ms, 140 * ms}
		s.run(2 * time.Minute)
		v := ps[0]
		s.crash(v)
		s.within(4*time.Second, "a kill is noticed", s.allFailed([]*proc{v}))
		v = ps[len(ps)-1]
		s.loseHost(v)
		s.within(6*time.Second, "a lost host is noticed", s.allFailed([]*proc{v}))
		s.run(10 * time.Second)
	})
}

// lineCase is a long line, and what it may cost.
type lineCase struct {
	roundTrip time.Duration // between two regions
	loss      float64

	joined       time.Duration // all, after the last start
	killed, lost time.Duration // known everywhere
	bytes        float64       // a second and member at rest, with all headers
}

// The limits hold for the median: a packet that TCP has to send again takes two round trips more.
var lineCases = []lineCase{
	{roundTrip: 150 * ms, joined: 800 * ms, killed: time.Second, lost: 2900 * ms, bytes: 160},
	{roundTrip: 150 * ms, loss: .01, joined: 1200 * ms, killed: time.Second, lost: 2900 * ms, bytes: 200},
	{roundTrip: 300 * ms, joined: 1500 * ms, killed: time.Second, lost: 3100 * ms, bytes: 160},
	{roundTrip: 300 * ms, loss: .02, joined: 2500 * ms, killed: time.Second, lost: 3100 * ms, bytes: 200},
	{roundTrip: 600 * ms, joined: 3 * time.Second, killed: 2 * time.Second, lost: 6 * time.Second, bytes: 160},
	{roundTrip: 600 * ms, loss: .01, joined: 4500 * ms, killed: 2 * time.Second, lost: 6 * time.Second, bytes: 200},
	{roundTrip: 1600 * ms, joined: 9 * time.Second, killed: 5 * time.Second, lost: 15 * time.Second, bytes: 200},
	{roundTrip: 1600 * ms, loss: .01, joined: 14 * time.Second, killed: 5 * time.Second, lost: 15 * time.Second, bytes: 200},
}

// lineFigures is what came of many runs.
type lineFigures struct {
	joined, killed, lost []time.Duration
	bytes, frames        []float64
	falseFail            int
}

// datagramOverhead is what IP, UDP, version and receiver hash add to a datagram.
const datagramOverhead = 20 + 8 + 1 + 4

// setLine makes the line between regions so long, with some jitter.
func (s *sim) setLine(roundTrip time.Duration) {
	s.line = [2]time.Duration{roundTrip * 45 / 100, roundTrip * 55 / 100}
}

// joinOne starts count members in turn, region by region; all join the first.
func (s *sim) joinOne(count int) {
	first := s.start(s.host(), "n00000")
	s.run(500 * ms)
	for i := range count - 1 {
		s.run(20 * ms)
		s.start(s.host(), fmt.Sprintf("n%05d", i+1), first.host)
	}
}

// play has twelve members join one, rest, and lose two of them.
func (f *lineFigures) play(t *testing.T, seed uint64, c lineCase, regions int) {
	s := newSim(t, seed)
	s.regions, s.loss = regions, c.loss
	s.setLine(c.roundTrip)
	s.joinOne(12)
	took, ok := s.until(time.Minute, 5*ms, s.agree)
	if !ok {
		t.Error("not everybody has joined within a minute")
	}
	f.joined = append(f.joined, took)

	s.run(20 * time.Second)
	const rest = 40
	s.packets, s.bytes, s.frames = 0, 0, 0
	s.run(rest * time.Second)
	per := float64(len(s.procs)) * rest
	f.bytes = append(f.bytes, (float64(s.bytes)+float64(s.packets)*datagramOverhead)/per)
	f.frames = append(f.frames, float64(s.frames)/per)

	ps := slices.Clone(s.procs)
	s.rng.Shuffle(len(ps), func(i, j int) { ps[i], ps[j] = ps[j], ps[i] })
	f.killed = append(f.killed, s.everywhere(ps[0], s.crash))
	f.lost = append(f.lost, s.everywhere(ps[1], s.loseHost))
	s.check()
	f.falseFail += s.falseFail
}

// everywhere is how long it takes until all know of a death.
func (s *sim) everywhere(victim *proc, kill func(...*proc)) time.Duration {
	kill(victim)
	took, ok := s.until(time.Minute, 5*ms, s.allFailed([]*proc{victim}))
	if !ok {
		s.problem("not everybody has noticed that %s is gone", victim.name)
	}
	s.run(10 * time.Second)
	return took
}

func median(fs []float64) float64 {
	slices.Sort(fs)
	return fs[len(fs)/2]
}

// Each length of a line, among three regions and with everybody far from everybody. SIM_SEEDS sets the number of seeds.
func TestLineThatIsLongCostsAMemberLittleAndFailsNobody(t *testing.T) {
	t.Parallel()
	seeds := simSeeds(20)
	for _, c := range lineCases {
		for _, regions := range []int{3, 12} {
			t.Run(fmt.Sprintf("%v,loss=%v%%,regions=%d", c.roundTrip, c.loss*100, regions), func(t *testing.T) {
				var f lineFigures
				for i := range seeds {
					f.play(t, seedFor(t.Name())+uint64(i), c, regions)
				}
				t.Logf("at rest %.0f bytes and %.3f frames a second and member, %d false failures", median(f.bytes), median(f.frames), f.falseFail)
				t.Logf("joined %s", quantiles(f.joined))
				t.Logf("killed %s", quantiles(f.killed))
				t.Logf("lost   %s", quantiles(f.lost))
				atMost(t, "to join", percentile(f.joined, .5), c.joined)
				atMost(t, "to notice a kill", percentile(f.killed, .5), c.killed)
				atMost(t, "to notice a lost host", percentile(f.lost, .5), c.lost)
				if got := median(f.bytes); got > c.bytes {
					t.Errorf("%.0f bytes a second and member, at most %.0f are wanted", got, c.bytes)
				}
			})
		}
	}
}

func TestSeedThatIsFarAwayIsJoined(t *testing.T) {
	for _, roundTrip := range []time.Duration{920 * ms, 1600 * ms, 2 * time.Second} {
		for _, loss := range []float64{0, .02} {
			t.Run(fmt.Sprintf("%v,loss=%v%%", roundTrip, loss*100), func(t *testing.T) {
				for i := range simSeeds(5) {
					s := newSim(t, seedFor(t.Name())+uint64(i))
					s.regions, s.loss = 2, loss
					s.setLine(roundTrip)
					s.joinOne(2)
					s.within(time.Minute, "both have joined", s.agree)
					s.run(time.Minute)
					s.check()
				}
			})
		}
	}
}

func TestLineThatChangesFailsNobody(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ before, after time.Duration }{
		{20 * ms, 800 * ms}, {20 * ms, 1600 * ms}, {150 * ms, 1600 * ms}, {800 * ms, 20 * ms}, {1600 * ms, 100 * ms},
	} {
		for _, regions := range []int{3, 12} {
			t.Run(fmt.Sprintf("%v to %v,regions=%d", c.before, c.after, regions), func(t *testing.T) {
				for i := range simSeeds(5) {
					s := newSim(t, seedFor(t.Name())+uint64(i))
					s.regions, s.loss = regions, .01
					s.setLine(c.before)
					s.joinOne(12)
					s.within(time.Minute, "all have joined", s.agree)
					for range 3 {
						s.run(30 * time.Second)
						s.setLine(c.after)
						s.run(30 * time.Second)
						s.setLine(c.before)
					}
					s.check()
				}
			})
		}
	}
}

// A thousand live through all of it in one run, since starting them is dear.
func TestSimulationOfAThousandMembers(t *testing.T) {
	t.Parallel()
	cases(t, []int{1000}, []float64{.05}, func(t *testing.T, s *sim, ps []*proc) {
		r := &report{s: s}
		r.idle(5 * time.Second)
		r.userEvents(3)
		r.deaths("kill -9", 3, s.crash)
		r.deaths("host lost", 1, s.loseHost)
		r.mass("30 % killed", .3, s.crash)
		t.Log("\n" + r.String())
		atMost(t, "a user event", r.spread, 20*ms)
		atMost(t, "noticing first", r.first, 50*ms)
		atMost(t, "noticing by all", r.all, 500*ms)
		if n := r.missed; n > 0 {
			t.Errorf("%d times somebody did not get to know something", n)
		}
	})
}

func TestSplitHeals(t *testing.T) {
	t.Parallel()
	both := []string{"halves", "one and the rest"}
	heals := func(length time.Duration, hows []string, sizes []int, losses []float64) {
		for _, how := range hows {
			t.Run(fmt.Sprint(length, " ", how), func(t *testing.T) {
				cases(t, sizes, losses, func(t *testing.T, s *sim, ps []*proc) {
					cut := len(ps) / 2
					if how != "halves" {
						cut = 1
					}
					s.excuse = apart
					s.split(ps[:cut], ps[cut:])
					s.run(length)
					for _, p := range ps {
						for _, q := range ps {
							if apart(p, q) && p.shows(q.name) != statusFailed {
								t.Fatalf("%s does not show %s as failed", p.name, q.name)
							}
						}
					}
					s.heal()
					s.within(s.healing(), "all alive again", s.agree)
					s.run(30 * time.Second)
				})
			})
		}
	}
	heals(40*time.Second, both, []int{2, 3, 10, 100}, []float64{0, .05, .2})
	heals(10*time.Minute, both, []int{2, 10}, []float64{0})
	heals(10*time.Minute, both[:1], []int{50}, []float64{0})
}

func TestLossOneWayBetweenAPairFailsNobody(t *testing.T) {
	cases(t, []int{3, 5, 10, 100}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		a := ps[0]
		b := s.byBirth[lifetime{a.n.heartbeats.watchers[0].Name, a.n.heartbeats.watchers[0].Instance}]
		s.oneWay[[2]int{a.host.i, b.host.i}] = true
		s.run(40 * time.Second)
		delete(s.oneWay, [2]int{a.host.i, b.host.i})
		s.oneWay[[2]int{b.host.i, a.host.i}] = true
		s.run(40 * time.Second)
	})
}

func TestProbesOfAMemberThatIsStoppedAgainAndAgainFailNobody(t *testing.T) {
	t.Parallel()
	for _, cycle := range [][2]time.Duration{{8 * time.Second, 50 * ms}, {500 * ms, 5 * ms}} {
		t.Run(fmt.Sprint(cycle[0], "/", cycle[1]), func(t *testing.T) {
			cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
				s.excuse = func(o, q *proc) bool { return q == ps[0] }
				for s.now < simStart+time.Minute {
					ps[0].stop()
					s.run(cycle[0])
					ps[0].cont()
					s.run(cycle[1])
				}
				s.within(s.healing(), "all alive", s.agree)
			})
		})
	}
}

func TestJoinOfAHundredConvergesAtOnce(t *testing.T) {
	t.Parallel()
	for _, loss := range []float64{0, .05, .2} {
		t.Run(fmt.Sprintf("loss=%v%%", loss*100), func(t *testing.T) {
			s := newSim(t, seedFor(t.Name()))
			s.loss = loss
			seed := s.start(s.host(), "seed")
			for i := range 100 {
				h := s.host()
				s.after(time.Duration(s.rng.Int64N(int64(time.Second))), func() { s.start(h, fmt.Sprintf("n%05d", i), seed.host) })
			}
			s.run(time.Second)
			limit := 300 * ms
			if loss > 0 {
				limit = 5 * time.Second // a lost SYN costs the first a second
			}
			s.within(limit, "converged", s.agree)
			s.run(10 * time.Second)
			for _, p := range s.procs {
				if p.fatal != nil || p.n.table.aliveCount() != 101 {
					t.Errorf("%s: %v, %d members", p.name, p.fatal, p.n.table.aliveCount())
				}
			}
			s.check()
		})
	}
}

// What a joiner misses while rings change all the time, it asks for at once: waiting for a second comparison of tables,
// one cluster in eight took a second.
func TestJoinOfAHundredWithinMomentsConvergesAtOnce(t *testing.T) {
	t.Parallel()
	base := seedFor(t.Name())
	for run := range uint64(8) {
		s := newSim(t, base+run)
		seed := s.start(s.host(), "seed")
		for i := range 100 {
			h := s.host()
			s.after(time.Duration(s.rng.Int64N(int64(200*ms))), func() { s.start(h, fmt.Sprintf("n%05d", i), seed.host) })
		}
		s.run(200 * ms)
		s.within(300*ms, "converged", s.agree)
	}
}

func TestJoinIsTheSameInAnyStartOrder(t *testing.T) {
	for _, loss := range []float64{0, .2} {
		t.Run(fmt.Sprintf("loss=%v%%", loss*100), func(t *testing.T) {
			s := newSim(t, seedFor(t.Name()))
			s.loss = loss
			seeds := []*simHost{s.host(), s.host()}
			for i := range 8 {
				s.start(s.host(), fmt.Sprint("w", i), seeds...)
			}
			s.run(10 * time.Second)
			s.start(seeds[0], "seed0", seeds...)
			s.start(seeds[1], "seed1", seeds...)
			s.within(35*time.Second, "converged", s.agree) // they had backed off
			s.run(time.Minute)
			s.check()
		})
	}
}

func TestSeedThatIsLateIsJoinedByAllWithinASecond(t *testing.T) {
	t.Parallel()
	for _, late := range []time.Duration{500 * ms, 3 * time.Second, 20 * time.Second, 50 * time.Second} {
		t.Run(late.String(), func(t *testing.T) {
			s := newSim(t, seedFor(t.Name()))
			h := s.host()
			for i := range 150 {
				s.start(s.host(), fmt.Sprint("w", i), h)
			}
			s.run(late)
			s.start(h, "seed", h)
			s.within(1200*ms, "all are in", s.agree)
			s.check()
		})
	}
}

func TestSeedThatIsMissingForLongIsTriedEach30s(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	p := s.start(s.host(), "w", s.host())
	tries := func(d time.Duration) int {
		before := p.n.joining.seeds[0].tries
		s.run(d)
		return p.n.joining.seeds[0].tries - before
	}
	if got := tries(time.Minute); got < 50 || got > 80 {
		t.Errorf("%d tries in the first minute", got)
	}
	tries(time.Minute)
	if got := tries(10 * time.Minute); got < 19 || got > 27 {
		t.Errorf("%d tries in ten minutes", got)
	}
}

func TestSeedThatIsLateIsOneLineWhenMissedAndOneWhenItAnswers(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	h := s.host()
	p := s.start(s.host(), "w", h)
	s.run(time.Minute)
	s.start(h, "seed")
	s.within(35*time.Second, "converged", s.agree)
	s.run(time.Minute)
	if len(p.logs) != 2 || !strings.Contains(p.logs[0], "[WARN] no seed answers") || p.logs[1] != "[INFO] joined through seed" {
		t.Errorf("it logs %q", p.logs)
	}
}

func TestSeedThatIsOnlyItselfSaysSoOnce(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	h := s.host()
	p := s.start(h, "seed0", h)
	s.run(time.Hour)
	if len(p.logs) != 1 || !strings.Contains(p.logs[0], "[INFO] no seed answers but this node itself") {
		t.Errorf("it logs %q", p.logs)
	}
}

func TestRetryMaxEndsOnlyANodeThatHasNeverJoined(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	seed := s.start(s.host(), "seed")
	nowhere := s.host()
	lonely := s.start(s.host(), "lonely", nowhere)
	lonely.n.cfg.retryMax = 5
	var ps []*proc
	for i := range 5 {
		ps = append(ps, s.start(s.host(), fmt.Sprint("m", i), seed.host))
		ps[i].n.cfg.retryMax = 5
	}
	s.run(20 * time.Second)
	if lonely.fatal == nil || !strings.Contains(lonely.fatal.Error(), nowhere.addr.String()) {
		t.Errorf("a node that has joined nobody in 5 rounds ends with %v", lonely.fatal)
	}
	s.crash(seed)
	s.run(5 * time.Minute)
	for _, p := range ps {
		if p.fatal != nil {
			t.Errorf("%s ends since its seed has died: %v", p.name, p.fatal)
		}
	}
}

func TestMemberThatTakesNoTCPCostsLittleAndIsNamed(t *testing.T) {
	cases(t, []int{3, 5, 20}, []float64{0}, func(t *testing.T, s *sim, ps []*proc) {
		s.run(time.Minute)
		idle := s.packets
		odd := s.start(s.host(), "odd", ps[0].host)
		odd.host.noTCP = true
		ps = append(ps, odd)
		s.run(time.Minute)
		s.packets = 0
		logs := 0
		for _, p := range ps {
			logs += len(p.logs)
		}
		s.run(time.Minute)
		if s.packets > 2*idle {
			t.Errorf("%d packets a minute, %d before", s.packets, idle)
		}
		s.run(5 * time.Minute)
		for _, p := range ps {
			logs -= len(p.logs)
		}
		if logs != 0 { // each probe is one
			t.Errorf("%d lines are logged in six minutes", -logs)
		}
		warned := 0
		for _, p := range ps {
			for _, l := range p.logs {
				if strings.Contains(l, "no TCP connection to "+odd.name+" at "+odd.host.addr.String()+" lasts") {
					warned++
				}
			}
		}
		if warned == 0 || warned > len(ps) {
			t.Errorf("%d warnings", warned)
		}
		if !s.agree() {
			t.Error("it is not alive for all")
		}
	})
}

func TestEventsArriveOnceDespiteLoss(t *testing.T) {
	cases(t, []int{2, 3, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		var spread []time.Duration
		const events = 20
		for i := range events {
			from := s.now
			name := fmt.Sprint("deploy", i)
			ps[i*7%len(ps)].do(func(n *node) {
				if err := n.userEvent(name, []byte("payload"), false); err != nil {
					t.Fatal(err)
				}
			})
			s.after(500*ms, func() {
				for _, p := range ps {
					if p.user[name] > 0 {
						spread = append(spread, p.userAt[name]-from)
					}
				}
			})
			s.run(time.Second)
		}
		s.run(5 * time.Second)
		for _, p := range ps {
			for i := range events {
				if c := p.user[fmt.Sprint("deploy", i)]; c != 1 {
					t.Errorf("%s has event %d %d times", p.name, i, c)
				}
			}
		}
		t.Logf("spread p50 %v p99 %v max %v; late %d", percentile(spread, .5), percentile(spread, .99), percentile(spread, 1), events*len(ps)-len(spread))
		if s.loss == 0 {
			atMost(t, "the spread", percentile(spread, .99), 20*ms)
		}
	})
}

func TestEventsOfAStormArriveWhole(t *testing.T) {
	t.Parallel()
	cases(t, []int{10, 50}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		for i := range 100 {
			ps[i%len(ps)].do(func(n *node) { n.userEvent(fmt.Sprint("e", i), make([]byte, 900), false) })
		}
		s.within(15*time.Second, "all have all", func() bool {
			for _, p := range ps {
				if len(p.user) != 100 {
					return false
				}
			}
			return true
		})
		for _, p := range ps {
			for name, c := range p.user {
				if c != 1 {
					t.Errorf("%s has %s %d times", p.name, name, c)
				}
			}
		}
	})
}

// burst sends events of size bytes from senders as fast as they are accepted, count in all, and names them SENDER-NUMBER.
type burst struct {
	s        *sim
	senders  []*proc
	accepted map[*proc]int
	ended    map[*proc]time.Duration
}

func (s *sim) burst(count, size int, senders ...*proc) *burst {
	b := &burst{s: s, senders: senders, accepted: make(map[*proc]int), ended: make(map[*proc]time.Duration)}
	for _, p := range senders {
		var next func()
		next = func() {
			for p.state == procRunning && b.accepted[p] < count {
				err := errEventsWait
				p.do(func(n *node) {
					err = n.userEvent(fmt.Sprintf("%s-%d", p.name, b.accepted[p]), make([]byte, size), false)
				})
				if err != nil {
					break
				}
				b.accepted[p]++
				b.ended[p] = s.now
			}
			if p.state != procDead && b.accepted[p] < count {
				s.after(2*ms, next) // as the RPC asks again
			}
		}
		next()
	}
	return b
}

// arrived reports whether p has all that was accepted of each sender, from the event first on.
func (b *burst) arrived(p *proc, first int) bool {
	for _, o := range b.senders {
		if got := p.from[o.name]; len(got) < b.accepted[o]-first {
			return false
		}
	}
	return true
}

// check fails the test where p has not heard all accepted events from first on, once and in order.
func (b *burst) check(t *testing.T, p *proc, first int) {
	t.Helper()
	for _, o := range b.senders {
		got, want := p.from[o.name], make([]string, 0)
		for i := first; i < b.accepted[o]; i++ {
			want = append(want, fmt.Sprintf("%s-%d", o.name, i))
		}
		if !slices.Equal(got, want) {
			at := 0
			for at < min(len(got), len(want)) && got[at] == want[at] {
				at++
			}
			t.Errorf("%s has %d of %d events of %s; from %d on: %q", p.name, len(got), len(want), o.name, at, got[at:min(len(got), at+5)])
		}
	}
}

// allArrive waits until count events of each sender are accepted and all of ps have them, and checks that.
func (b *burst) allArrive(t *testing.T, count int, ps ...*proc) {
	t.Helper()
	b.s.within(time.Minute, "all have all", func() bool {
		return !slices.ContainsFunc(b.senders, func(p *proc) bool { return b.accepted[p] < count }) &&
			!slices.ContainsFunc(ps, func(p *proc) bool { return !b.arrived(p, 0) })
	})
	b.s.run(5 * time.Second) // would anything come twice?
	for _, p := range ps {
		b.check(t, p, 0)
	}
}

func TestEventsOfABurstArriveOnceAndInOrder(t *testing.T) {
	t.Parallel()
	cases(t, []int{2, 3, 10, 50}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		count := 1000
		if len(ps) > 10 {
			count = 300
		}
		p, from := ps[len(ps)/2], s.now
		b := s.burst(count, 900, p)
		b.allArrive(t, count, ps...)
		t.Logf("accepted %.0f events a second", float64(count)/(b.ended[p]-from).Seconds())
	})
}

func TestEventsOfManySendersArriveOnceAndInOrder(t *testing.T) {
	t.Parallel()
	cases(t, []int{5, 20}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		s.burst(50, 100, ps...).allArrive(t, 50, ps...)
	})
}

// A newcomer in the middle hears all that is sent from some moment on, and the others miss nothing for it.
func TestEventsOfABurstArriveWhileMembersJoin(t *testing.T) {
	t.Parallel()
	cases(t, []int{3, 10}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		b := s.burst(600, 900, ps[1])
		var late []*proc
		for i := range 3 {
			s.run(100 * ms)
			late = append(late, s.start(s.host(), fmt.Sprint("late", i), ps[0].host))
		}
		b.allArrive(t, 600, ps...)
		for _, p := range late {
			if p.n.joining.joinedAt > b.ended[ps[1]] {
				continue // all was before its time
			}
			s.within(20*time.Second, "the late one has the last", func() bool { return slices.Contains(p.from[ps[1].name], ps[1].name+"-599") })
			first := 600 - len(p.from[ps[1].name])
			if first == 0 {
				t.Errorf("%s has heard what was before its time", p.name)
			}
			b.check(t, p, first)
		}
	})
}

// One that is stopped holds up the others for a moment at most, and catches up.
func TestEventsOfABurstPassAMemberThatIsStopped(t *testing.T) {
	t.Parallel()
	cases(t, []int{3, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[2]
		v.stop()
		from := s.now
		b := s.burst(1000, 900, ps[1])
		s.within(8*time.Second, "the others have all", func() bool {
			return b.accepted[ps[1]] == 1000 && !slices.ContainsFunc(others(ps, v), func(p *proc) bool { return !b.arrived(p, 0) })
		})
		s.run(8*time.Second - (s.now - from))
		v.cont()
		b.allArrive(t, 1000, ps...)
	})
}

func TestEventsOfASplitArriveOnBothSidesWhenItHeals(t *testing.T) {
	t.Parallel()
	cases(t, []int{4, 10}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = apart
		half := len(ps) / 2
		b := s.burst(300, 100, ps[0], ps[half])
		s.run(20 * ms)
		s.split(ps[:half], ps[half:])
		s.run(40 * time.Second)
		s.heal()
		s.within(time.Minute, "one cluster", s.agree)
		b.allArrive(t, 300, ps...)
	})
}

// A receiver that restarts hears what is sent from then on; a sender that is killed leaves nobody with more than others.
func TestEventsOfABurstSurviveRestarts(t *testing.T) {
	t.Parallel()
	cases(t, []int{4, 10}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		x, v := ps[1], ps[2]
		b := s.burst(600, 900, x)
		s.run(150 * ms)
		s.crash(v)
		s.run(20 * ms)
		w := s.start(v.host, v.name, ps[0].host)
		b.allArrive(t, 600, others(ps, v)...)
		s.within(20*time.Second, "the restarted one has the last", func() bool { return slices.Contains(w.from[x.name], x.name+"-599") })
		b.check(t, w, 600-len(w.from[x.name]))

		c := s.burst(600, 900, x)
		s.run(150 * ms)
		s.crash(x)
		y := s.start(x.host, x.name, ps[0].host)
		s.within(20*time.Second, "it is back", s.agree)
		s.run(10 * time.Second)
		for _, p := range others(ps, v, x) {
			first := ps[0].from[x.name][600:]
			if got := p.from[x.name][600:]; !slices.Equal(got, first) || len(got) > c.accepted[x] {
				t.Errorf("%s has %d events of the killed one, another has %d of %d", p.name, len(got), len(first), c.accepted[x])
			}
		}
		for _, p := range others(ps, v, x) {
			p.from[x.name] = nil
		}
		s.burst(100, 900, y).allArrive(t, 100, others(append(ps, y), x, v)...)
	})
}

func TestLeaveIsNoFailure(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)-1]
		from := s.now
		v.do(func(n *node) { n.identity.startLeave(n) })
		s.within(1200*ms, "the leaver is done", func() bool { return v.left })
		s.within(5*time.Second, "all show it as left", func() bool { return all(ps, v.name, statusLeft) })
		s.run(20 * time.Second)
		if failed := s.times(eventFailed, v.name, from); len(failed) > 0 {
			t.Errorf("%d member-failed", len(failed))
		}
		if left := s.times(eventLeave, v.name, from); len(left) != len(ps)-1 {
			t.Errorf("%d member-leave", len(left))
		}
		w := s.start(v.host, v.name, ps[0].host)
		s.within(5*time.Second, "back again", s.agree)
		_ = w
	})
}

// story checks that all of ps saw just these events about name since from.
func (s *sim) story(ps []*proc, name string, from time.Duration, want ...eventKind) {
	s.tb.Helper()
	got := make(map[*proc][]eventKind)
	for _, o := range s.seen {
		if o.Member.Name == name && o.at >= from {
			got[o.by] = append(got[o.by], o.kind)
		}
	}
	wrong := 0
	for _, p := range ps {
		if fmt.Sprint(got[p]) != fmt.Sprint(want) {
			if wrong++; wrong <= 3 {
				s.tb.Errorf("%s saw of %s: %v, wanted %v", p.name, name, got[p], want)
			}
		}
	}
	if wrong > 3 {
		s.tb.Errorf("and %d others", wrong-3)
	}
}

func TestRestartIsFailedThenJoin(t *testing.T) {
	t.Parallel()
	for _, gap := range []time.Duration{ms, 10 * ms, 50 * ms, time.Second} {
		t.Run(gap.String(), func(t *testing.T) {
			cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[len(ps)/2]
				from := s.now
				s.crash(v)
				s.run(gap)
				w := s.start(v.host, v.name, ps[0].host, ps[len(ps)-1].host)
				s.within(5*time.Second, "all alive", s.agree)
				s.run(20 * time.Second)
				s.story(others(ps, v), v.name, from, eventFailed, eventJoin)
				if w.fatal != nil {
					t.Error(w.fatal)
				}
			})
		})
	}
}

// It knows no member, but the members that knew it go on probing it.
func TestRestartThatJoinsNobodyIsTakenBack(t *testing.T) {
	for _, down := range []time.Duration{100 * ms, 10 * time.Second, 10 * time.Minute} {
		cases(t, []int{2, 6, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
			v := ps[len(ps)/2]
			s.crash(v)
			s.run(down)
			s.start(v.host, v.name)
			s.within(2*time.Minute, "taken back", s.agree)
		})
	}
}

// Its port answers and its name is right, but it is not the member that died.
func TestRestartThatJoinsNobodyIsAFailure(t *testing.T) {
	cases(t, []int{2, 3, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		from := s.now
		s.crash(v)
		s.run(ms)
		s.start(v.host, v.name)
		s.within(5*time.Second, "all say that it has failed", func() bool {
			return len(s.times(eventFailed, v.name, from)) >= len(ps)-1
		})
	})
}

func TestNameMovesToANewAddressWhenTheOldHostIsGone(t *testing.T) {
	for _, gap := range []time.Duration{0, time.Second, 10 * time.Second} {
		t.Run(gap.String(), func(t *testing.T) {
			cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[len(ps)/2]
				from := s.now
				s.loseHost(v)
				s.run(gap)
				w := s.start(s.host(), v.name, ps[0].host)
				limit := 3 * time.Second
				if s.loss > 0 {
					limit = 12 * time.Second
				}
				s.within(limit, "all show the new one", s.agree)
				s.run(20 * time.Second)
				s.story(others(ps, v), v.name, from, eventFailed, eventJoin)
				if w.fatal != nil {
					t.Error(w.fatal)
				}
				// the old host comes back to life: its instance is gone, nothing flips
			})
		})
	}
}

func TestNameThatIsTakenMakesANewcomerGiveUp(t *testing.T) {
	cases(t, []int{1, 2, 3, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		holder := ps[len(ps)/2]
		for _, seed := range []*proc{ps[0], holder} {
			from := s.now
			w := s.start(s.host(), holder.name, seed.host)
			s.within(6*time.Second, "the newcomer gives up", func() bool { return w.fatal != nil })
			if w.fatal != nil && !strings.Contains(w.fatal.Error(), holder.host.addr.String()) {
				t.Errorf("the error does not name the holder: %v", w.fatal)
			}
			s.run(10 * time.Second)
			s.story(ps, holder.name, from)
			if !s.agree() {
				t.Error("the holder was disturbed")
			}
		}
	})
}

func TestNameOfTwoStartedInOneMillisecondIsOnes(t *testing.T) {
	cases(t, []int{2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = func(o, q *proc) bool { return q.name == "twin" }
		a := s.start(s.host(), "twin", ps[0].host)
		b := s.start(s.host(), "twin", ps[len(ps)-1].host)
		s.within(4*time.Second, "one gives up", func() bool { return (a.fatal == nil) != (b.fatal == nil) })
		s.run(20 * time.Second)
		if a.fatal != nil && b.fatal != nil || !all(ps, "twin", statusAlive) {
			t.Errorf("none is left: %v; %v", a.fatal, b.fatal)
		}
	})
}

func TestNameOfAMemberIsKeptWhenOthersJoinANamesake(t *testing.T) {
	for _, how := range []string{"through another", "itself", "failed", "left"} {
		t.Run(how, func(t *testing.T) {
			cases(t, []int{2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				holder := ps[1]
				s.excuse = func(o, q *proc) bool {
					return o.name == holder.name || q.name == holder.name && !slices.Contains(ps, o)
				}
				young := s.start(s.host(), holder.name)
				other := s.start(s.host(), "other", young.host)
				s.run(5 * time.Second)
				to := other
				switch how {
				case "itself":
					to = young
				case "failed":
					s.crash(young)
				case "left":
					young.do(func(n *node) { n.identity.startLeave(n) })
				}
				s.run(5 * time.Second)
				from := s.now
				ps[0].join(to.host.addr)
				switch how {
				case "through another":
					s.within(8*time.Second, "the younger gives up", func() bool { return young.fatal != nil })
					fallthrough
				case "failed", "left":
					s.within(10*time.Second, "one cluster", s.agree)
				case "itself":
					s.within(5*time.Second, "the join ends", func() bool { return len(ps[0].joins) > 0 })
					if err := ps[0].joins[0]; err == nil || !strings.Contains(err.Error(), "is taken: the member at "+holder.host.addr.String()) {
						t.Errorf("the join ended with %v", err)
					}
				}
				s.run(20 * time.Second)
				s.story(ps, holder.name, from)
				if holder.fatal != nil {
					t.Error(holder.fatal)
				}
			})
		})
	}
}

func TestNameOnBothSidesOfASplitMakesTheYoungerGiveWay(t *testing.T) {
	cases(t, []int{4, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		older := ps[0]
		s.excuse = func(o, q *proc) bool { return apart(o, q) || q.name == older.name }
		a, b := ps[:len(ps)/2], ps[len(ps)/2:]
		s.split(a, b)
		s.run(10 * time.Second)
		h := s.host()
		h.group = 2
		younger := s.start(h, older.name, b[0].host)
		s.run(10 * time.Second)
		if younger.fatal != nil {
			t.Fatalf("gave up while the older was out of reach: %v", younger.fatal)
		}
		if !all(b, older.name, statusAlive) {
			t.Fatal("the younger has not joined its side")
		}
		s.heal()
		s.within(4*time.Second, "the younger gives up", func() bool { return younger.fatal != nil })
		if younger.fatal != nil && !strings.Contains(younger.fatal.Error(), older.host.addr.String()) {
			t.Errorf("the error does not name the holder: %v", younger.fatal)
		}
		s.within(4*time.Second, "all alive again", s.agree)
		s.run(20 * time.Second)
		if older.fatal != nil || !s.agree() {
			t.Errorf("the older was disturbed: %v", older.fatal)
		}
	})
}

func TestAddressOfADeadMemberGoesToANewName(t *testing.T) {
	for _, gap := range []time.Duration{ms, 50 * ms, 5 * time.Second} {
		t.Run(gap.String(), func(t *testing.T) {
			cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[len(ps)/2]
				from := s.now
				s.crash(v)
				s.run(gap)
				s.start(v.host, "newname", ps[0].host)
				s.within(5*time.Second, "the old one failed", s.allFailed([]*proc{v}))
				s.run(30 * time.Second)
				s.story(others(ps, v), v.name, from, eventFailed)
				s.story(others(ps, v), "newname", from, eventJoin)
			})
		})
	}
}

func TestJoinWithAClockSetBackIsTaken(t *testing.T) {
	for _, gap := range []time.Duration{ms, 5 * time.Second} {
		t.Run(gap.String(), func(t *testing.T) {
			cases(t, []int{2, 3, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[len(ps)/2]
				from := s.now
				s.crash(v)
				s.run(gap)
				s.wallShift = -24 * time.Hour
				s.start(v.host, v.name, ps[0].host)
				s.within(5*time.Second, "all alive", s.agree)
				s.run(20 * time.Second)
				s.story(others(ps, v), v.name, from, eventFailed, eventJoin)
			})
		})
	}
}

func TestForceLeaveReachesEverybodyAndStays(t *testing.T) {
	t.Parallel()
	for _, prune := range []bool{false, true} {
		t.Run(fmt.Sprint("prune=", prune), func(t *testing.T) {
			cases(t, []int{3, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
				v := ps[len(ps)/2]
				s.loseHost(v)
				s.within(10*time.Second, "failed", s.allFailed([]*proc{v}))
				s.run(time.Second)
				from := s.now
				ps[0].do(func(n *node) {
					if err := n.forceLeave(ps[len(ps)-1].name, prune); err == nil {
						t.Error("a member that is alive was made to leave")
					}
					if err := n.forceLeave(v.name, prune); err != nil {
						t.Error(err)
					}
				})
				want := statusLeft
				if prune {
					want = 0
				}
				s.within(5*time.Second, "everywhere", func() bool { return all(ps, v.name, want) })
				s.run(time.Minute)
				if !all(ps, v.name, want) {
					t.Error("it came back")
				}
				if prune {
					s.story(others(ps, v), v.name, from, eventLeave, eventReap)
				} else {
					s.story(others(ps, v), v.name, from, eventLeave)
				}
			})
		})
	}
}

// Until all have forgotten a member their digests differ, and every heartbeat
// would ask for an exchange of tables that can change nothing.
func TestReapOfAMemberCostsNoTraffic(t *testing.T) {
	cases(t, []int{3, 30, 100}, []float64{0}, func(t *testing.T, s *sim, ps []*proc) {
		for _, p := range ps {
			p.n.cfg.reapAfter = 10 * time.Minute
			p.n.antiEntropy.reapAt = p.n.now + time.Duration(s.rng.Int64N(int64(time.Second)))
		}
		s.crash(ps[len(ps)/2])
		s.run(9 * time.Minute)
		s.frames = 0
		s.run(2 * time.Minute)
		t.Logf("%d frames", s.frames)
		if s.frames > len(ps) {
			t.Errorf("%d frames", s.frames)
		}
		for _, p := range s.running() {
			if len(p.n.members("", maxMembers)) != len(ps)-1 {
				t.Errorf("%s shows %d members", p.name, len(p.n.members("", maxMembers)))
			}
		}
	})
}

func TestReapOfAFailedMemberHappensOnce(t *testing.T) {
	for _, loss := range []float64{0, .2} {
		for _, n := range []int{3, 10, 50} {
			t.Run(fmt.Sprintf("N=%d,loss=%v%%", n, loss*100), func(t *testing.T) {
				s := newSim(t, seedFor(t.Name()))
				s.loss, s.reapAfter = loss, 20*time.Second
				ps := s.cluster(n)
				v := ps[n/2]
				from := s.now
				s.loseHost(v)
				s.run(15 * time.Second)
				late := s.start(s.host(), "late", ps[0].host)
				s.run(15 * time.Second)
				if !all(s.procs, v.name, 0) {
					t.Error("after 30 s not forgotten")
				}
				s.run(2 * time.Minute)
				s.story(others(ps, v), v.name, from, eventFailed, eventReap)
				s.story([]*proc{late}, v.name, from, eventReap)
				if late.shows(v.name) != 0 || late.n.table.get(v.name) != nil {
					t.Error("the late one still has it")
				}
				s.check()
			})
		}
	}
}

// joined starts n agents that all join the first, and waits until they agree.
func (s *sim) joined(n int) []*proc {
	for range n {
		s.start(s.host(), fmt.Sprintf("n%05d", len(s.hosts)-1), s.hosts[0])
	}
	if _, ok := s.until(3*time.Second, ms, s.agree); !ok {
		s.tb.Error("they have not joined within 3 s")
	}
	return s.procs[len(s.procs)-n:]
}

// A newcomer is greeted by all its new watchers at once; were it to promise a whole
// cycle to all of them, its death would go unnoticed for as long.
func TestJoinOfAHostThatVanishesAtOnceIsNoticedInTime(t *testing.T) {
	t.Parallel()
	for _, n := range []int{2, 3, 5, 8, 30, 100} {
		for _, loss := range []float64{0, .05} {
			t.Run(fmt.Sprintf("N=%d,loss=%v%%", n, loss*100), func(t *testing.T) {
				lose := func(s *sim, dead []*proc) time.Duration {
					from := s.now
					s.loseHost(dead...)
					s.until(20*time.Second, 10*ms, s.allFailed(dead))
					return s.now - from
				}
				var one, tenth []time.Duration
				for i := range min(20, max(3, 100/n)) {
					s := newSim(t, seedFor(fmt.Sprint(t.Name(), i)))
					s.loss = loss
					ps := s.joined(n)
					one = append(one, lose(s, ps[n-1:]))
					if n >= 10 {
						tenth = append(tenth, lose(s, s.joined(n/10)))
					}
					s.check()
				}
				t.Logf("one: p50 %v max %v; a tenth at once: p50 %v max %v", percentile(one, .5), percentile(one, 1), percentile(tenth, .5), percentile(tenth, 1))
				slack := time.Duration(loss * float64(50*time.Second)) // a lost vote costs a round
				atMost(t, "noticing one", percentile(one, 1), 2800*ms+slack)
				if n >= 10 {
					atMost(t, "noticing a tenth", percentile(tenth, 1), 2900*ms+slack)
				}
			})
		}
	}
}

// anySeed plays a story with a dozen seeds; make sim plays it with more.
func anySeed(t *testing.T, play func(t *testing.T, s *sim)) {
	t.Parallel()
	for i := range simSeeds(12) {
		t.Run(fmt.Sprint("seed", i), func(t *testing.T) { play(t, newSim(t, seedFor(t.Name()))) })
	}
}

// Most helpers are as dead as their target, and which others live is not known.
func TestFailureOfMostHostsOfAHundredIsNoticedWithAnySeed(t *testing.T) {
	anySeed(t, func(t *testing.T, s *sim) {
		ps := s.cluster(100)
		var dead []*proc
		for _, i := range s.rng.Perm(len(ps))[:80] {
			dead = append(dead, ps[i])
		}
		s.loseHost(dead...)
		s.within(12*time.Second, "all show all dead as failed", s.allFailed(dead))
	})
}

// Those that are promised the next heartbeat may be among those that vanish.
func TestJoinOfHostsThatVanishAtOnceIsNoticedWithAnySeed(t *testing.T) {
	anySeed(t, func(t *testing.T, s *sim) {
		for _, dead := range []func() []*proc{
			func() []*proc { return s.joined(30)[29:] },
			func() []*proc { return s.joined(3) },
		} {
			vanish := dead()
			from := s.now
			s.loseHost(vanish...)
			s.until(20*time.Second, 10*ms, s.allFailed(vanish))
			atMost(t, fmt.Sprint("noticing ", len(vanish)), s.now-from, 2900*ms)
		}
	})
}

// A ring change gives the victim other watchers, or takes it those with which it has a link.
func TestFailureRightAfterARingChangeIsNoticedWithAnySeed(t *testing.T) {
	changes := map[string]func(s *sim, ps []*proc){
		"a join":     func(s *sim, ps []*proc) { s.start(s.host(), "new", ps[0].host) },
		"a kill":     func(s *sim, ps []*proc) { s.crash(ps[1]) },
		"a leave":    func(s *sim, ps []*proc) { ps[1].do(func(n *node) { n.identity.startLeave(n) }) },
		"a lost one": func(s *sim, ps []*proc) { s.loseHost(ps[1]); s.run(2300 * ms) },
		"a restart":  func(s *sim, ps []*proc) { s.crash(ps[1]); s.start(ps[1].host, ps[1].name, ps[2].host) },
		"its links' ends": func(s *sim, ps []*proc) {
			for l := range ps[3].links {
				s.crash(s.byBirth[l])
			}
		},
	}
	anySeed(t, func(t *testing.T, s *sim) {
		seed := s.seed
		for _, what := range slices.Sorted(maps.Keys(changes)) {
			s := newSim(t, seed)
			ps := s.cluster(8)
			changes[what](s, ps)
			s.run(time.Duration(s.rng.Int64N(int64(150 * ms))))
			from := s.now
			s.crash(ps[3])
			s.run(2 * time.Second)
			atMost(t, what+", noticing", percentile(s.times(eventFailed, ps[3].name, from), 0), 50*ms)
			s.check()
		}

		ps := s.joined(8)
		s.run(5*ms + time.Duration(s.rng.Int64N(int64(150*ms)))) // until its first link stands
		from := s.now
		s.crash(ps[7])
		s.run(2 * time.Second)
		atMost(t, "its own join, noticing", percentile(s.times(eventFailed, ps[7].name, from), 0), 50*ms)
	})
}

// answering has every agent answer queries with its name.
func (s *sim) answering() {
	s.reply = func(p *proc, ev Event) {
		p.tell(func(n *node) { n.queries.sendReply(n, ev, replyDone, []byte(p.name)) })
	}
}

// simQuery is a query that p has asked.
type simQuery struct {
	p  *proc
	id uint32
}

// ask has p ask everybody name.
func (p *proc) ask(name string, within time.Duration) (q simQuery) {
	p.do(func(n *node) {
		id, _, err := n.queries.ask(n, name, []byte("payload"), nil, within)
		if q = (simQuery{p, id}); err != nil {
			p.s.tb.Error(err)
		}
	})
	return q
}

func (q simQuery) over() bool {
	return slices.ContainsFunc(q.p.answers, func(ev Event) bool { return ev.id == q.id && ev.reply == replyNone })
}

// came is how many have the query, and how, and how often, each member has answered.
func (q simQuery) came() (heard int, replies map[string][]reply) {
	has := make(map[string]bool)
	replies = make(map[string][]reply)
	for _, ev := range q.p.answers {
		if ev.id != q.id || ev.reply == replyNone {
			continue
		}
		has[ev.Member.Name] = true
		if ev.reply != replyAck {
			if replies[ev.Member.Name] = append(replies[ev.Member.Name], ev.reply); ev.reply == replyDone && string(ev.Payload) != ev.Member.Name {
				q.p.s.problem("%s answers %q", ev.Member.Name, ev.Payload)
			}
		}
	}
	return len(has), replies
}

func TestQueryEndsWhenAllHaveAnsweredDespiteLoss(t *testing.T) {
	t.Parallel()
	play := func(name string, want reply) func(t *testing.T, s *sim, ps []*proc) {
		return func(t *testing.T, s *sim, ps []*proc) {
			if want == replyDone {
				s.answering()
			}
			q := ps[0].ask(name, 15*time.Second)
			limit := 150 * ms
			if s.loss > 0 {
				limit = 8 * time.Second
			}
			s.within(limit, "over", q.over)
			heard, replies := q.came()
			if heard != len(ps) || len(replies) != len(ps) {
				t.Errorf("%d have it, %d answered", heard, len(replies))
			}
			for who, rs := range replies {
				if len(rs) != 1 || rs[0] != want {
					t.Errorf("%s: %v", who, rs)
				}
			}
			s.run(8 * time.Second)
			for _, p := range ps {
				if p.asked != 1 {
					t.Errorf("%s was asked %d times", p.name, p.asked)
				}
				letter := func(q *request) bool { return q.at < never && q.h.Kind != msgHeartbeat }
				if slices.ContainsFunc(p.n.requests.open, letter) || len(p.n.queries.open) > 0 {
					t.Errorf("%s still has letters", p.name)
				}
			}
		}
	}
	t.Run("load", func(t *testing.T) { cases(t, []int{1, 2, 10, 100}, []float64{0, .2}, play("load", replyDone)) })
	t.Run("unknown", func(t *testing.T) { cases(t, []int{1, 2, 10, 100}, []float64{0, .2}, play("unknown", replyNothing)) })
	t.Run("load", func(t *testing.T) { cases(t, []int{1000}, []float64{.05}, play("load", replyDone)) })
}

// A dead member is not waited for once that is known; a restarted one has not been
// asked; a stalled one answers late.
func TestQueryOutlivesStallsDeathsAndRestarts(t *testing.T) {
	t.Parallel()
	cases(t, []int{10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		killed, lost, stalled, restarted := ps[1], ps[2], ps[3], ps[4]
		s.excuse = func(o, q *proc) bool { return q.name == restarted.name }
		s.answering()
		stalled.stop()
		s.crash(killed, restarted)
		s.loseHost(lost)
		q := ps[0].ask("load", 15*time.Second)
		again := s.start(restarted.host, restarted.name, ps[0].host)
		s.after(3*time.Second, stalled.cont)
		d := s.within(12*time.Second, "over", q.over)
		if d < 3*time.Second {
			t.Errorf("over after %v, while a member stalls that will answer", d)
		}
		heard, replies := q.came()
		if want := len(ps) - 3; heard != want || len(replies) != want || len(replies[stalled.name]) != 1 {
			t.Errorf("%d have it, %d answered, %d of those asked live; the stalled one: %v", heard, len(replies), want, replies[stalled.name])
		}
		s.run(20 * time.Second)
		if again.asked != 0 {
			t.Error("a query was heard by a run that was not asked")
		}
	})
}

// A member out of reach does not keep a query open for longer than its time, and
// hears nothing of it later.
func TestQueryIsNeverHeardLate(t *testing.T) {
	cases(t, []int{2, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		s.answering()
		s.excuse = apart
		s.split(ps[:1], ps[1:])
		q := ps[0].ask("load", time.Second)
		s.within(1100*ms, "over", q.over)
		s.heal()
		s.run(20 * time.Second)
		if _, replies := q.came(); len(replies) != 1 {
			t.Errorf("%v answered", replies)
		}
		for _, p := range ps[1:] {
			if p.asked != 0 {
				t.Errorf("%s heard it", p.name)
			}
		}
	})
}

func TestQueriesInAFloodStarveNoHeartbeat(t *testing.T) {
	t.Parallel()
	cases(t, []int{10, 50}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		s.answering()
		var open []simQuery
		for range 40 {
			for range min(20, maxQueries-len(ps[0].n.queries.open)) {
				open = append(open, ps[0].ask("load", 15*time.Second))
			}
			s.run(50 * ms)
		}
		v := ps[len(ps)/2]
		s.crash(v)
		s.within(3*time.Second, "a kill is noticed", s.allFailed([]*proc{v}))
		s.run(5 * time.Second)
		t.Logf("%d queries", len(open))
		for i, q := range open {
			if _, replies := q.came(); !q.over() || len(replies) < len(ps)-1 {
				t.Fatalf("query %d: over %v, %d answers", i, q.over(), len(replies))
			}
		}
	})
}

func TestTagsReachEverybodyAsOneUpdate(t *testing.T) {
	t.Parallel()
	cases(t, []int{2, 3, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		var took []time.Duration
		for i := range 5 {
			v, from := ps[(i*41)%len(ps)], s.now
			v.do(func(n *node) {
				if err := n.identity.setTags(n, map[string]string{"state": fmt.Sprint("drain", i)}, nil); err != nil {
					t.Error(err)
				}
			})
			s.run(5 * time.Second)
			for _, p := range ps {
				if got := p.n.table.get(v.name).Tags; got != Tags(fmt.Sprint("state=drain", i)) {
					t.Errorf("%s has %q of %s", p.name, got, v.name)
				}
			}
			s.story(ps, v.name, from, eventUpdate)
			took = append(took, s.times(eventUpdate, v.name, from)...)
			if len(ps) <= 5 {
				break
			}
		}
		t.Logf("everybody knows: p50 %v p99 %v", percentile(took, .5), percentile(took, .99))
		if s.loss == 0 {
			atMost(t, "knowing", percentile(took, .99), 20*ms)
		}
	})
}

// A member that forgets the dead sooner than the others is not told of them again
// and again.
func TestReapAtDifferentTimesHappensOnce(t *testing.T) {
	for _, loss := range []float64{0, .2} {
		for _, n := range []int{3, 10, 50} {
			t.Run(fmt.Sprintf("N=%d,loss=%v%%", n, loss*100), func(t *testing.T) {
				s := newSim(t, seedFor(t.Name()))
				s.loss = loss
				ps := s.cluster(n)
				v := ps[n/2]
				s.loseHost(v)
				s.run(time.Minute)
				s.reapAfter = 2 * time.Second
				soon := s.start(s.host(), "soon", ps[0].host)
				s.within(8*time.Second, "it has joined", s.agree)
				s.run(10 * time.Second)
				w := others(ps, v, ps[0])[0]
				from := s.now
				s.crash(w)
				s.run(10 * time.Second)
				s.frames = 0
				s.run(2 * time.Minute)
				s.story([]*proc{soon}, v.name, 0)
				s.story([]*proc{soon}, w.name, from, eventFailed, eventReap)
				s.story(others(ps, v, w), w.name, from, eventFailed)
				if per := float64(s.frames) / float64(len(ps)) / 120; loss == 0 && per > .1 {
					t.Errorf("%.2f frames a member and second", per)
				}
				s.check()
			})
		}
	}
}

// "reboot" must not run again where it has just rebooted a machine, whichever way
// its agent comes back.
func TestEventFromThePastIsNotHeardAgainAfterARestart(t *testing.T) {
	t.Parallel()
	ways := map[string]func(s *sim, v *proc, ps []*proc) *proc{
		"without seeds":    func(s *sim, v *proc, ps []*proc) *proc { return s.start(v.host, v.name) },
		"through a seed":   func(s *sim, v *proc, ps []*proc) *proc { return s.start(v.host, v.name, ps[0].host) },
		"its seed is down": func(s *sim, v *proc, ps []*proc) *proc { return s.start(v.host, v.name, s.host()) },
		"by a command": func(s *sim, v *proc, ps []*proc) *proc {
			w := s.start(v.host, v.name)
			s.run(ms)
			w.join(ps[0].host.addr)
			return w
		},
		"joined by another": func(s *sim, v *proc, ps []*proc) *proc {
			w := s.start(v.host, v.name)
			s.run(ms)
			ps[0].join(w.host.addr)
			return w
		},
		"under another name": func(s *sim, v *proc, ps []*proc) *proc { return s.start(v.host, "renamed", ps[0].host) },
	}
	for how, back := range ways {
		for _, down := range []time.Duration{ms, time.Second, time.Minute} {
			t.Run(fmt.Sprint(how, " ", down), func(t *testing.T) {
				cases(t, []int{2, 3, 10, 40}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
					v := ps[len(ps)-1]
					ps[len(ps)/2].do(func(n *node) { n.userEvent("reboot", nil, false) })
					s.run(5 * time.Second)
					s.crash(v)
					s.run(down)
					w := back(s, v, ps)
					s.within(time.Minute, "it is back", s.agree)
					ps[0].do(func(n *node) { n.userEvent("after", nil, false) })
					s.run(10 * time.Second)
					if w.user["reboot"] != 0 || w.user["after"] != 1 {
						t.Errorf("the event of before is heard %d times, the later one %d", w.user["reboot"], w.user["after"])
					}
				})
			})
		}
	}
}

// Two clusters that had nothing to do with each other become one: what was sent in
// one of them is not the other's.
func TestEventsOfAClusterBeforeItMetAnotherAreNotHeardThere(t *testing.T) {
	cases(t, []int{2, 6, 20}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		var qs []*proc
		for i := range len(ps) {
			var seeds []*simHost
			if i > 0 {
				seeds = []*simHost{qs[0].host}
			}
			qs = append(qs, s.start(s.host(), fmt.Sprint("q", i), seeds...))
			s.run(10 * ms)
		}
		s.run(10 * time.Second)
		ps[1].do(func(n *node) { n.userEvent("of p", nil, false) })
		qs[1].do(func(n *node) { n.userEvent("of q", nil, false) })
		s.run(5 * time.Second)
		ps[0].join(qs[0].host.addr, qs[1].host.addr) // of five dials one fails at 20 % loss
		s.within(10*time.Second, "one cluster", s.agree)
		ps[1].do(func(n *node) { n.userEvent("of both", nil, false) })
		s.run(20 * time.Second)
		for _, p := range s.procs {
			mine, other := "of p", "of q"
			if slices.Contains(qs, p) {
				mine, other = other, mine
			}
			if p.user[mine] != 1 || p.user[other] != 0 || p.user["of both"] != 1 {
				t.Errorf("%s has heard %v", p.name, p.user)
			}
		}
	})
}

// flapsAreDamped lets two minutes pass after the start of an unreachable agent, and checks that few were told of few
// failures, and that one line says what to do.
func (s *sim) flapsAreDamped(bad ...*proc) {
	s.tb.Helper()
	s.excuse = func(_, q *proc) bool { return slices.Contains(bad, q) }
	s.run(2 * time.Minute)
	told := make(map[*proc]int)
	for _, o := range s.seen {
		if o.kind == eventFailed {
			told[o.by]++
		}
	}
	for _, p := range s.running() {
		if told[p] > 4*len(bad) {
			s.tb.Errorf("%s is told %d failures in two minutes", p.name, told[p])
		}
		if n := p.countLogs("-advertise"); n > 1 {
			s.tb.Errorf("%s warns %d times", p.name, n)
		}
	}
	for _, b := range bad {
		warned := 0
		for _, p := range s.running() {
			warned += p.countLogs(b.n.self.Addr.String())
		}
		if warned == 0 {
			s.tb.Errorf("nobody names %s of %s", b.n.self.Addr, b.name)
		}
	}
	s.crash(bad...)
	s.run(5 * time.Minute) // until those that held it have looked once more
}

// countLogs is how many warnings of p hold text.
func (p *proc) countLogs(text string) (n int) {
	for _, l := range p.logs {
		if strings.HasPrefix(l, "[WARN]") && strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// advertiseWrong are the wrong addresses that an agent may advertise: where a host refuses, and where there is nothing.
func advertiseWrong(s *sim, what string) netip.AddrPort {
	if what == "refused" {
		return s.host().addr
	}
	return netip.MustParseAddrPort("10.255.0.1:7946")
}

func TestFlapOfAnUnreachableAddressIsDamped(t *testing.T) {
	for _, what := range []string{"refused", "nothing"} {
		t.Run(what, func(t *testing.T) {
			cases(t, []int{1, 2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				h := s.host()
				h.advertise = advertiseWrong(s, what)
				s.flapsAreDamped(s.start(h, "wrong", ps[0].host))
			})
		})
	}
}

func TestFlapOfASeedAndAJoinerWithUnreachableAddressesIsDamped(t *testing.T) {
	for _, what := range []string{"refused", "nothing"} {
		for _, healthy := range []int{0, 1, 6} {
			t.Run(fmt.Sprint(what, " ", healthy), func(t *testing.T) {
				s := newSim(t, seedFor(t.Name()))
				h, g := s.host(), s.host()
				h.advertise, g.advertise = advertiseWrong(s, what), advertiseWrong(s, what)
				a := s.start(h, "a")
				s.run(100 * ms)
				for i := range healthy {
					s.start(s.host(), fmt.Sprint("c", i), h)
				}
				s.run(100 * ms)
				s.flapsAreDamped(a, s.start(g, "b", h))
			})
		}
	}
}

// Some members reach it, and some do not.
// It comes to its seed again and again, from its own address, where a filter lets nobody in.
func TestFlapOfAMemberBehindAFilterIsDamped(t *testing.T) {
	cases(t, []int{1, 2, 3, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		h := s.host()
		h.filtered = true
		s.flapsAreDamped(s.start(h, "filtered", ps[0].host))
	})
}

func TestFlapOfAMemberThatOnlySomeReachIsDamped(t *testing.T) {
	cases(t, []int{3, 6, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		h := s.host()
		for _, p := range ps[len(ps)/2:] {
			s.oneWay[[2]int{p.host.i, h.i}] = true
		}
		s.flapsAreDamped(s.start(h, "half", ps[0].host))
	})
}

// It sends, and takes nothing but what it has asked for; or it is deaf to all that comes by UDP.
func TestFlapOfAMemberBehindATranslatorIsDamped(t *testing.T) {
	cases(t, []int{2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		h := s.host()
		h.behindNAT()
		s.flapsAreDamped(s.start(h, "natted", ps[0].host))
	})
}

func TestFlapOfTwoMembersBehindTranslatorsIsDamped(t *testing.T) {
	cases(t, []int{1, 3, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		h, g := s.host(), s.host()
		h.behindNAT()
		g.behindNAT()
		s.flapsAreDamped(s.start(h, "natted1", ps[0].host), s.start(g, "natted2", ps[0].host))
	})
}

func TestFlapDampingDelaysNoHealingOfOneThatAnswers(t *testing.T) {
	cases(t, []int{2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = func(o, q *proc) bool { return true }
		for range 3 {
			s.split(ps[:len(ps)/2], ps[len(ps)/2:])
			s.run(12 * time.Second)
			s.heal()
			s.within(s.healing(), "all alive again", s.agree)
			s.run(10 * time.Second)
		}
	})
}

// What a newcomer's clock shows must not matter.
var clocks = []time.Duration{0, -time.Hour, -48 * time.Hour, time.Hour, 48 * time.Hour}

// Case by case: what happens to the holder while a newcomer asks for its name.
func TestNameOfAStalledHolderIsKept(t *testing.T) {
	for _, stall := range []time.Duration{time.Second, 3 * time.Second, 8 * time.Second} {
		for _, clock := range clocks {
			t.Run(fmt.Sprint(stall, " ", clock), func(t *testing.T) {
				cases(t, []int{2, 3, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
					holder := ps[1]
					from := s.now
					holder.stop()
					s.after(stall, holder.cont)
					s.wallShift = clock
					w := s.start(s.host(), holder.name, ps[0].host)
					s.within(stall+s.patience(), "the newcomer gives up", func() bool { return w.fatal != nil })
					s.run(10 * time.Second)
					s.story(ps, holder.name, from)
					if holder.fatal != nil || !s.agree() {
						t.Errorf("the holder was disturbed: %v", holder.fatal)
					}
				})
			})
		}
	}
}

// patience is how long a round of joining may take: a lost SYN or frame costs a round.
func (s *sim) patience() time.Duration {
	if s.loss > 0 {
		return 8 * time.Second
	}
	return 3 * time.Second
}

// The cluster reaches the holder, and the newcomer does not.
func TestNameOfAHolderThatOnlyTheNewcomerCannotReachIsKept(t *testing.T) {
	for _, clock := range clocks {
		t.Run(clock.String(), func(t *testing.T) {
			cases(t, []int{2, 6, 20}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				holder, h := ps[1], s.host()
				s.oneWay[[2]int{h.i, holder.host.i}] = true
				s.oneWay[[2]int{holder.host.i, h.i}] = true
				s.wallShift = clock
				from := s.now
				w := s.start(h, holder.name, ps[0].host)
				s.within(nameHeldTimeout+s.patience(), "the newcomer gives up", func() bool { return w.fatal != nil })
				clear(s.oneWay)
				s.run(15 * time.Second)
				s.story(ps, holder.name, from)
				if holder.fatal != nil || !s.agree() {
					t.Errorf("the holder was disturbed: %v", holder.fatal)
				}
			})
		})
	}
}

// Whatever the clocks say, the one that came in later gives way when a split heals.
func TestNameOnBothSidesOfASplitIsTheOlders(t *testing.T) {
	for _, clock := range clocks {
		t.Run(clock.String(), func(t *testing.T) {
			cases(t, []int{2, 4, 10}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
				older := ps[0]
				s.excuse = func(o, q *proc) bool { return apart(o, q) || q.name == older.name || o.name == older.name }
				a, b := ps[:len(ps)/2], ps[len(ps)/2:]
				s.split(a, b)
				s.run(10 * time.Second)
				h := s.host()
				h.group = 2
				s.wallShift = clock
				younger := s.start(h, older.name, b[0].host)
				s.run(10 * time.Second)
				if younger.fatal != nil {
					t.Fatalf("gave up while the older was out of reach: %v", younger.fatal)
				}
				s.heal()
				s.within(8*time.Second, "the younger gives up", func() bool { return younger.fatal != nil })
				s.within(5*time.Second, "all alive again", s.agree)
				s.run(20 * time.Second)
				if older.fatal != nil || !s.agree() {
					t.Errorf("the older was disturbed: %v", older.fatal)
				}
			})
		})
	}
}

// It is older as a process, and in no cluster.
func TestNameOfALoneAgentThatIsToldToBeJoinedEndsNobody(t *testing.T) {
	for _, clock := range clocks {
		t.Run(clock.String(), func(t *testing.T) {
			s := newSim(t, seedFor(t.Name()))
			lone := s.start(s.host(), "web")
			s.run(time.Minute)
			red := s.start(s.host(), "red")
			s.wallShift = clock
			web := s.start(s.host(), "web", red.host)
			s.run(5 * time.Second)
			for _, p := range []*proc{red, web} {
				p.join(lone.host.addr)
				s.run(10 * time.Second)
				if len(p.joins) != 1 || !errors.Is(p.joins[0], errNameTaken) && !strings.Contains(fmt.Sprint(p.joins[0]), errNameTaken.Error()) {
					t.Errorf("the join of %s ends with %v", p.name, p.joins)
				}
			}
			for _, p := range s.procs {
				if p.fatal != nil {
					t.Errorf("%s ends: %v", p.name, p.fatal)
				}
			}
			if red.shows("web") != statusAlive || len(red.n.members("", maxMembers)) != 2 {
				t.Errorf("red shows %v", red.n.members("", maxMembers))
			}
		})
	}
}

// Images of one machine, with one name and one list of seeds.
func TestNameOfTwoNewcomersThatJoinEachOtherIsOnes(t *testing.T) {
	for _, clock := range clocks {
		for _, later := range []time.Duration{0, ms, 500 * ms, 3 * time.Second} {
			t.Run(fmt.Sprint(clock, " ", later), func(t *testing.T) {
				s := newSim(t, seedFor(t.Name()))
				h, g := s.host(), s.host()
				a := s.start(h, "localhost", h, g)
				s.run(later)
				s.wallShift = clock
				b := s.start(g, "localhost", h, g)
				s.within(5*time.Second, "one gives up", func() bool { return (a.fatal == nil) != (b.fatal == nil) })
				s.run(time.Minute)
				if a.fatal != nil && b.fatal != nil {
					t.Errorf("none is left: %v; %v", a.fatal, b.fatal)
				}
				if later > ms && a.fatal != nil {
					t.Errorf("the older one ends: %v", a.fatal)
				}
			})
		}
	}
}
