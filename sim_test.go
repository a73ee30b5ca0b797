// sim_test.go: a whole cluster in virtual time.
//
// Every node is the real core; what it puts out goes over a simulated wire as
// encoded bytes. There is one heap of (time, sequence) and one seeded random
// source, so that a seed gives the same run every time. scenario_test.go holds
// the stories that are played on it.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sim is the world: the clock, the network, the hosts.
type sim struct {
	tb      testing.TB
	seed    uint64
	rng     *rand.Rand
	codec   *codec
	now     time.Duration
	seq     uint64
	queue   []simItem
	hosts   []*simHost
	procs   []*proc
	byBirth map[birth]*proc
	numbers map[string]int // of the names, in order of appearance

	loss      float64 // of each datagram and each SYN
	lat       [2]time.Duration
	oneWay    map[[2]int]bool // host to host: nothing arrives
	reapAfter time.Duration
	wallShift time.Duration // what clocks of agents started from now on show too much

	hash        uint64 // of all that was delivered, when tracing
	tracing     bool
	verbose     bool
	packetTrace bool
	quiet       bool // do not keep observations

	seen      []observation
	excuse    func(observer, target *proc) bool // failed events that are not false
	falseFail int
	problems  []string
	checkAt   time.Duration

	packets, bytes int // sent by UDP
	frames         int
}

// birth identifies one run of an agent.
type birth struct {
	name string
	born uint64
}

// known is what a node has told of a name, and its highest incarnation.
type known struct {
	told EventKind
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
	addr  netip.AddrPort
	up    bool // its link
	noTCP bool // a firewall refuses all connections to it
	group int  // hosts of different groups cannot talk
	p     *proc
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
	inbox     []simArrival
	datagrams int  // of those in the inbox
	scheduled bool // a run event is in the heap
	timer     time.Duration
	gen       uint64
	conns     []*simConn
	accepted  connID

	known  []known // by the number of the name
	user   map[string]int
	userAt map[string]time.Duration
	joins  []joined
	logs   []string
	left   bool
	fatal  error
}

type arrivalKind uint8

const (
	gotDatagram arrivalKind = iota
	gotFrame
	gotDialed
	gotClosed
	gotResolved
)

// simArrival is one thing that waits for a node's loop.
type simArrival struct {
	kind arrivalKind
	from netip.AddrPort
	data []byte
	id   connID
	err  error
}

// simConn is one TCP connection; end 0 dialled, end 1 accepted.
type simConn struct {
	to    *simHost
	end   [2]*proc
	id    [2]connID
	open  [2]bool
	q     [2][]segment // on the way to that end
	busy  [2]bool      // a delivery is in the heap
	tries [2]int
}

type segment struct {
	data []byte
	fin  bool
	at   time.Duration
}

type itemKind uint8

const (
	itemRun itemKind = iota
	itemWake
	itemPacket
	itemSyn
	itemSegment
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
	to   netip.AddrPort
	data []byte
	c    *simConn
	end  int
	fn   func()
}

var (
	errTimedOut = errors.New("connection timed out")
	errReset    = errors.New("connection reset by peer")
)

const (
	simWall     = 1_700_000_000_000 // Unix ms at virtual time 0
	simStart    = time.Hour         // no clock starts at 0
	simBacklog  = 256               // datagrams that wait in a socket
	simTCPGives = 15                // retransmissions
)

func newSim(tb testing.TB, seed uint64) *sim {
	s := &sim{
		tb:        tb,
		seed:      seed,
		rng:       rand.New(rand.NewPCG(seed, 0x68616d6c6574)),
		codec:     newCodec(),
		now:       simStart,
		byBirth:   make(map[birth]*proc),
		numbers:   make(map[string]int),
		lat:       [2]time.Duration{ms / 10, ms / 2},
		oneWay:    make(map[[2]int]bool),
		reapAfter: 24 * time.Hour,
		verbose:   os.Getenv("SIM_TRACE") != "",

		packetTrace: os.Getenv("SIM_TRACE") == "2",
	}
	if tb != nil {
		tb.Cleanup(func() {
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
	case itemSyn:
		s.syn(w.c)
	case itemSegment:
		s.segment(w.c, w.end)
	case itemFunc:
		w.fn()
	}
}

func (s *sim) latency() time.Duration {
	return s.lat[0] + time.Duration(s.rng.Int64N(int64(s.lat[1]-s.lat[0])))
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
	h := &simHost{i: i, addr: netip.AddrPortFrom(ip, 7946), up: true}
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
	born := uint64(simWall + (s.now+s.wallShift)/ms)
	self := Member{Name: name, Addr: h.addr, Incarnation: born, Born: born, Status: StatusAlive}
	p := &proc{s: s, host: h, name: name, user: make(map[string]int), userAt: make(map[string]time.Duration)}
	cfg := nodeConfig{Self: self, ReapAfter: s.reapAfter, Codec: s.codec}
	for _, seed := range seeds {
		cfg.Seeds = append(cfg.Seeds, seed.addr.String())
		p.seeds = append(p.seeds, seed.addr)
	}
	for i := 0; i < len(cfg.Random); i += 8 {
		binary.LittleEndian.PutUint64(cfg.Random[i:], s.rng.Uint64())
	}
	p.n = newNode(cfg, s.now)
	if h.p != nil && h.p.state != procDead {
		panic("two agents on one host")
	}
	h.p = p
	s.procs = append(s.procs, p)
	s.byBirth[birth{name, born}] = p
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
	model := newTable()
	var all []known
	for _, p := range ps {
		model.apply(time.Second, p.n.self.Member, 0)
		s.number(p.name)
		all = append(all, known{EventJoin, p.n.self.Incarnation})
	}
	for _, p := range ps {
		p.n.t = cloneTable(model)
		p.n.self = p.n.t.get(p.name)
		p.n.everJoined = true
		p.known = slices.Clone(all)
	}
	s.run(4 * time.Second)
	s.packets, s.bytes, s.frames = 0, 0, 0
	return ps
}

// cloneTable copies a table of living members, without its pending events.
func cloneTable(t *table) *table {
	c := &table{byName: make(map[string]*entry, len(t.ordered)), digest: t.digest, version: t.version}
	slab := make([]entry, len(t.ordered))
	c.ordered = make([]*entry, 0, len(t.ordered))
	for i, e := range t.ordered {
		slab[i] = *e
		c.byName[e.Name] = &slab[i]
		c.ordered = append(c.ordered, &slab[i])
	}
	for i := range t.ring {
		c.ring[i] = make([]*entry, 0, len(t.ring[i]))
		for _, e := range t.ring[i] {
			c.ring[i] = append(c.ring[i], c.byName[e.Name])
		}
	}
	return c
}

func (p *proc) schedule(d time.Duration) {
	if !p.scheduled {
		p.scheduled = true
		p.s.push(p.s.now+d, &work{kind: itemRun, p: p})
	}
}

// put queues an arrival; a running loop takes it, and whatever else has come by
// then, a few microseconds later.
func (p *proc) put(in simArrival) {
	if p.state == procDead {
		return
	}
	if in.kind == gotDatagram {
		if p.datagrams >= simBacklog {
			return
		}
		p.datagrams++
	}
	p.inbox = append(p.inbox, in)
	if p.state == procRunning {
		p.schedule(20 * time.Microsecond)
	}
}

// run is one turn of the loop: all that arrived, a tick, then the outputs.
func (p *proc) run() {
	if p.state != procRunning {
		return
	}
	s, n := p.s, p.n
	inbox := p.inbox
	p.inbox, p.datagrams = nil, 0
	for _, in := range inbox {
		s.note(byte(in.kind), p, in.data)
		s.show(p, in)
		switch in.kind {
		case gotDatagram:
			if err := n.datagram(s.now, in.from, in.data); err != nil {
				s.problem("%s: datagram of %s: %v", p.name, in.from, err)
			}
		case gotFrame:
			if err := n.frame(s.now, in.id, in.data); err != nil {
				if s.verbose {
					s.logf("%s: frame on %d: %v", p.name, in.id, err)
				}
				n.closed(s.now, in.id, err)
			}
		case gotDialed:
			n.dialed(s.now, in.id, in.err)
		case gotClosed:
			n.closed(s.now, in.id, in.err)
		case gotResolved:
			n.seedsResolved(s.now, p.seeds, nil)
		}
	}
	n.tick(s.now)
	p.carryOut(n.take())
}

// show prints what arrives, with SIM_TRACE=2.
func (s *sim) show(p *proc, in simArrival) {
	if !s.packetTrace {
		return
	}
	text := ""
	if in.data != nil {
		h, rest, _ := s.codec.readHead(in.data)
		text = fmt.Sprintf("%+v", h)
		for len(rest) > 0 {
			var u update
			u, rest, _ = s.codec.readUpdate(rest)
			text += fmt.Sprintf(" | %s %v inc %d+%d by %s %s", u.Name, u.Status, u.Incarnation-u.Raised, u.Raised, u.By, u.Event)
		}
	}
	s.logf("%s <- kind %d stream %d %s %v %s", p.name, in.kind, in.id, in.from, in.err, text)
}

// do calls the node as an RPC would.
func (p *proc) do(fn func(n *node)) {
	if p.state != procRunning {
		panic("call to an agent that does not run")
	}
	fn(p.n)
	p.run()
}

func (p *proc) carryOut(o outputs) {
	s := p.s
	for _, pk := range o.packets {
		s.packets++
		s.bytes += len(pk.data)
		if len(pk.data) > maxDatagram {
			s.problem("%s sends a datagram of %d bytes", p.name, len(pk.data))
		}
		s.push(s.now+s.latency(), &work{kind: itemPacket, from: p.host, to: pk.to, data: pk.data})
	}
	for _, op := range o.streams {
		p.stream(op)
	}
	for _, l := range o.logs {
		p.logs = append(p.logs, l)
		if s.verbose {
			s.logf("%s: %s", p.name, l)
		}
	}
	for _, ev := range o.events {
		p.event(ev)
	}
	p.joins = append(p.joins, o.joins...)
	if o.resolve {
		s.after(ms/5, func() { p.put(simArrival{kind: gotResolved}) })
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
	for _, c := range slices.Clone(p.conns) {
		for end := range c.end {
			if c.end[end] == p {
				c.closeEnd(end)
			}
		}
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

func (s *sim) arrive(from *simHost, to netip.AddrPort, data []byte) {
	h := s.hostAt(to)
	if h == nil || !s.reach(from, h) || from != h && s.lost() || h.p == nil {
		return
	}
	h.p.put(simArrival{kind: gotDatagram, from: from.addr, data: data})
}

func (p *proc) stream(op streamOp) {
	s := p.s
	if s.packetTrace {
		s.logf("%s: stream %d, operation %d %s", p.name, op.id, op.op, op.to)
	}
	if op.op == opDial {
		c := &simConn{to: s.hostAt(op.to), id: [2]connID{op.id}}
		c.end[0], c.open[0] = p, true
		p.conns = append(p.conns, c)
		s.push(s.now+s.latency(), &work{kind: itemSyn, c: c})
		return
	}
	for _, c := range p.conns {
		if end := endOf(op.id); c.id[end] == op.id && c.end[end] == p {
			if op.op == opClose {
				c.closeEnd(end)
			} else {
				s.frames++
				if len(op.data) > maxFrame {
					s.problem("%s sends a frame of %d bytes", p.name, len(op.data))
				}
				c.send(1-end, segment{data: op.data})
			}
			return
		}
	}
}

func endOf(id connID) int {
	if id > 0 {
		return 0
	}
	return 1
}

// syn is a SYN's arrival. Lost, the kernel sends it anew after 1, 2, 4 s.
func (s *sim) syn(c *simConn) {
	p := c.end[0]
	if !c.open[0] || p.state == procDead {
		return
	}
	h := c.to
	if h == nil || !s.reach(p.host, h) || !s.reach(h, p.host) || p.host != h && s.lostTwice() {
		if c.tries[0]++; c.tries[0] <= 5 {
			s.push(s.now+time.Second<<(c.tries[0]-1), &work{kind: itemSyn, c: c})
		}
		return
	}
	c.tries[0] = 0
	back := s.latency()
	if h.p == nil || h.p.state == procDead || h.noTCP {
		c.forget(0)
		s.after(back, func() { p.put(simArrival{kind: gotDialed, id: c.id[0], err: fmt.Errorf("dial: %w", errRefused)}) })
		return
	}
	q := h.p
	q.accepted--
	c.end[1], c.id[1], c.open[1] = q, q.accepted, true
	q.conns = append(q.conns, c)
	s.after(back, func() {
		if c.open[0] {
			p.put(simArrival{kind: gotDialed, id: c.id[0]})
		}
	})
}

// send puts a segment on its way to an end, behind those before it. On an
// established stream nothing gets lost, but a loss costs a retransmission.
func (c *simConn) send(end int, g segment) {
	s := c.end[1-end].s
	g.at = s.now + s.latency()
	if s.lost() {
		g.at += 200 * ms
	}
	if q := c.q[end]; len(q) > 0 {
		g.at = max(g.at, q[len(q)-1].at)
	}
	c.q[end] = append(c.q[end], g)
	if !c.busy[end] {
		c.busy[end] = true
		s.push(g.at, &work{kind: itemSegment, c: c, end: end})
	}
}

func (s *sim) segment(c *simConn, end int) {
	c.busy[end] = false
	if len(c.q[end]) == 0 {
		return
	}
	from, to := c.end[1-end], c.end[end]
	if to == nil { // dialled, never answered
		c.q[end] = nil
		return
	}
	again := func(at time.Duration) {
		c.busy[end] = true
		s.push(at, &work{kind: itemSegment, c: c, end: end})
	}
	if !s.reach(from.host, to.host) || !s.reach(to.host, from.host) {
		if c.tries[end]++; c.tries[end] <= simTCPGives {
			again(s.now + min(200*ms<<(c.tries[end]-1), 2*time.Minute))
		} else {
			c.reset(1-end, errTimedOut)
		}
		return
	}
	c.tries[end] = 0
	g := c.q[end][0]
	c.q[end] = c.q[end][1:]
	switch {
	case to.state == procDead && !g.fin:
		c.reset(1-end, errReset)
	case !c.open[end]:
	case g.fin:
		c.reset(end, io.EOF)
	default:
		to.put(simArrival{kind: gotFrame, id: c.id[end], data: g.data})
	}
	if len(c.q[end]) > 0 {
		again(c.q[end][0].at)
	}
}

// reset tells an end that its stream is over.
func (c *simConn) reset(end int, err error) {
	if c.open[end] {
		c.forget(end)
		c.end[end].put(simArrival{kind: gotClosed, id: c.id[end], err: err})
	}
}

// closeEnd closes a stream from one end; the other end hears of it behind what
// was sent before.
func (c *simConn) closeEnd(end int) {
	if c.open[end] {
		c.forget(end)
		if c.end[1-end] != nil {
			c.send(1-end, segment{fin: true})
		}
	}
}

func (c *simConn) forget(end int) {
	c.open[end] = false
	p := c.end[end]
	if c.end[0] != c.end[1] || !c.open[1-end] { // an agent may dial itself
		p.conns = slices.DeleteFunc(p.conns, func(o *simConn) bool { return o == c })
	}
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
	if ev.Kind == EventUser {
		p.user[ev.Name]++
		p.userAt[ev.Name] = s.now
		s.note('u', p, []byte(ev.Name))
		return
	}
	s.note('e', p, []byte(ev.Member.Name+ev.Kind.String()))
	if s.verbose {
		s.logf("%s: %s %s %s inc=%d", p.name, ev.Kind, ev.Member.Name, ev.Member.Addr.Addr(), ev.Member.Incarnation)
	}
	k := p.of(ev.Member.Name)
	was := k.told
	up := was == EventJoin || was == EventUpdate
	ok := false
	switch ev.Kind {
	case EventJoin:
		ok = !up
	case EventUpdate, EventFailed:
		ok = up
	case EventLeave:
		ok = up || was == EventFailed
	case EventReap:
		ok = !up // or it was dead already when this node joined
	}
	if !ok {
		s.problem("%s: %s of %s after %s", p.name, ev.Kind, ev.Member.Name, was)
	}
	k.told = ev.Kind
	if !s.quiet {
		s.seen = append(s.seen, observation{s.now, p, ev})
	}
	if q := s.byBirth[birth{ev.Member.Name, ev.Member.Born}]; ev.Kind == EventFailed && q != nil && q.state != procDead {
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
	e := p.n.t.get(p.name)
	if e != p.n.self || e.Status != StatusAlive || e.lost {
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
		if p.state == procDead || len(p.n.t.events) > 0 {
			continue // the latter: it has not had its first turn
		}
		last := ""
		for _, e := range p.n.t.ordered {
			if e.Name <= last {
				s.problem("%s: entries %s and %s", p.name, last, e.Name)
			}
			last = e.Name
			k := p.of(e.Name)
			if e.Incarnation < k.inc {
				s.problem("%s: the incarnation of %s fell", p.name, e.Name)
			}
			k.inc = e.Incarnation
			if e.reaped {
				continue
			}
			var want Status
			switch k.told {
			case EventJoin, EventUpdate:
				want = StatusAlive
			case EventFailed:
				want = StatusFailed
			case EventLeave:
				want = StatusLeft
			}
			if v := e.visible(); v != want && !(want == 0 && v.dead()) && v != StatusPruned {
				s.problem("%s: events left %s %v, the table has it %v", p.name, e.Name, want, v)
			}
		}
	}
}

// check ends a scenario: all that must always hold has held.
func (s *sim) check() {
	s.tb.Helper()
	s.checkTables()
	for _, p := range s.problems {
		s.tb.Errorf("%s", p)
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
	if e := p.n.t.get(name); e != nil && !e.reaped && e.Status != StatusPruned {
		return e.visible()
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
		for _, e := range p.n.t.ordered {
			if e.visible() == StatusAlive && !e.reaped {
				if q := s.byBirth[birth{e.Name, e.Born}]; q == nil || q.state == procDead || q.n.self.Incarnation != e.Incarnation {
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
func (s *sim) times(kind EventKind, name string, from time.Duration) []time.Duration {
	var ds []time.Duration
	for _, o := range s.seen {
		if o.Kind == kind && o.Member.Name == name && o.at >= from && o.by.name != name {
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
		ps[s.rng.IntN(len(ps))].do(func(n *node) { n.userEvent(s.now, name, []byte("payload"), false) })
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
		ts := s.times(EventFailed, v.name, from)
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
const simEntry = 420

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

func TestNodesJoinAndNoticeAKill(t *testing.T) {
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
			d, ok = s.until(10*time.Second, ms, func() bool { return all(s.procs, victim.name, StatusFailed) })
			ts := s.times(EventFailed, victim.name, from)
			t.Logf("kill: first %v p50 %v all %v (until: %v)", percentile(ts, 0), percentile(ts, .5), percentile(ts, 1), d)
			if !ok {
				t.Error("not everybody noticed")
			}
			s.check()
		})
	}
}

func TestSameSeedGivesTheSameRun(t *testing.T) {
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
		ps[7].do(func(n *node) { n.userEvent(s.now, "deploy", []byte("x"), false) })
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
