// sim_test.go: the simulator, a whole cluster in virtual time. The stories that are
// played on it are in detect_test.go and gossip_test.go, by their subjects.
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
		model.apply(time.Second, p.n.self.Member, 0).firstHeard = s.now
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
		p.s.compare(p, a, &stateSync{joins: true, byCommand: true}, func(err error) { p.joins = append(p.joins, err) })
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

// ---- what stories share ----

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

// anySeed plays a story with a dozen seeds; make sim plays it with more.
func anySeed(t *testing.T, play func(t *testing.T, s *sim)) {
	t.Parallel()
	for i := range simSeeds(12) {
		t.Run(fmt.Sprint("seed", i), func(t *testing.T) { play(t, newSim(t, seedFor(t.Name()))) })
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

// What a newcomer's clock shows must not matter.
var clocks = []time.Duration{0, -time.Hour, -48 * time.Hour, time.Hour, 48 * time.Hour}

// patience is how long a round of joining may take: a lost SYN or frame costs a round.
func (s *sim) patience() time.Duration {
	if s.loss > 0 {
		return 8 * time.Second
	}
	return 3 * time.Second
}
