// hostile_test.go: what strangers and bad bytes can do. A node among hostile peers
// in virtual time, and the ports of real agents in this process.

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// rig plays the whole world around one node. What the peers do is read from
// in; after each step the node must still be what a member has to be.
type rig struct {
	t    *testing.T
	in   []byte
	n    *node
	now  time.Duration
	over bool // it left, or found its name taken

	sealed  [][]byte // datagrams that went either way, to be replayed
	pieces  [][]byte // the same of pieces of tables
	seqs    []uint32 // of questions that the node has asked
	looks   []Member // that may still see something
	tables  []*rigTable
	numbers map[string]uint64
	mode    [rigPeers]peerMode
	beatAt  time.Duration
	trying  bool // the node waits for its seed
	todo    []func()

	may       map[netip.AddrPort]bool // members, seeds, addresses of joins and namesakes
	got, sent map[netip.AddrPort]int  // bytes from and to all others
	incs      map[*entry]uint64
	told      map[string]eventKind
}

// rigTable is an exchange of tables.
type rigTable struct {
	stateSync
	dialled bool // by the node
}

// peerMode is how a peer answers of its own accord.
type peerMode byte

const (
	peerAbsent peerMode = iota
	peerAnswers
	peerRefuses
	peerSilent // its kernel accepts
)

// rigPeers is how many of the names answer at addresses; the node is number 0.
const rigPeers = 8

var rigNames = []string{"n", "a", "b", "c", "d", "e", "f", strings.Repeat("g", maxName), "stranger", "bad name", ""}

func rigAddr(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(1 + i)}), 7946)
}

// rigPeer is which peer lives at an address; 0 if none does.
func rigPeer(a netip.AddrPort) int {
	for i := 1; i < rigPeers; i++ {
		if rigAddr(i) == a {
			return i
		}
	}
	return 0
}

// newRig makes a node with 0 to 7 peers out of the first bytes.
func newRig(t *testing.T, in []byte) *rig {
	r := &rig{t: t, in: in, numbers: make(map[string]uint64), may: make(map[netip.AddrPort]bool), incs: make(map[*entry]uint64),
		got: make(map[netip.AddrPort]int), sent: make(map[netip.AddrPort]int), told: make(map[string]eventKind)}
	self := Member{Name: "n", Addr: rigAddr(0), Incarnation: 1000, Instance: 1000}
	setup := r.byte()
	if setup&1 > 0 {
		self.Name, self.Tags = strings.Repeat("n", maxName), Tags("k="+strings.Repeat("v", maxTags-2))
		self.Incarnation, self.Instance = 1<<55+1<<20, 1<<55
	}
	cfg := nodeConfig{member: self, reapAfter: 20 * time.Second}
	if setup&2 > 0 {
		cfg.seeds = []string{"seed"}
	}
	cfg.random[0] = setup
	r.n = newNode(cfg, 0)
	r.note()
	for i := 1; i <= int(setup>>2%rigPeers); i++ {
		r.mode[i] = peerAnswers
		r.n.applyAndForward(&update{Member: Member{Name: rigNames[i], Addr: rigAddr(i), Incarnation: 1005, Instance: 1000, Status: statusAlive}})
		r.n.joining.joinedAt = 1
	}
	r.settle()
	return r
}

func (r *rig) byte() byte {
	if len(r.in) == 0 {
		return 0
	}
	b := r.in[0]
	r.in = r.in[1:]
	return b
}

func (r *rig) pick(n int) int { return int(r.byte()) % n }

func (r *rig) name() string {
	if i := r.pick(len(rigNames) + 1); i < len(rigNames) && i > 0 {
		return rigNames[i]
	} else if i > 0 {
		return fmt.Sprintf("m%03d", r.byte())
	}
	return r.n.self.Name
}

// source is where a datagram seems to come from: a peer or a stranger.
func (r *rig) source(name string) netip.AddrPort {
	if k := r.pick(4); k > 0 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(k)}), 9)
	} else if e := r.n.table.get(name); e != nil {
		return e.Addr
	}
	return rigAddr(1)
}

// incarnation is near what the node believes of name, or far from it.
func (r *rig) incarnation(name string) (inc, raised uint64) {
	inc, born := uint64(1000), uint64(1000)
	if e := r.n.table.get(name); e != nil {
		inc, born = e.Incarnation, e.Instance
	}
	switch r.byte() % 8 {
	case 0:
		inc++
	case 1:
		inc--
	case 2:
		inc, born = inc+5, inc+5
	case 3:
		inc, born = inc-5, inc-5
	case 4:
		inc = 1 << (r.byte() % 64)
	}
	return inc, inc - born
}

func (r *rig) head() header {
	hdr := header{Kind: msgKind(r.byte() % 10), From: r.name(), Promise: uint32(r.byte()) * 20}
	hdr.Incarnation, hdr.Raised = r.incarnation(hdr.From)
	r.numbers[hdr.From]++
	if hdr.Number = r.numbers[hdr.From]; r.byte()%16 == 0 {
		hdr.Number = 1 << (r.byte() % 64)
	}
	sel := r.byte()
	if hdr.Target = r.name(); sel&1 > 0 {
		hdr.Target = r.n.self.Name
	}
	if hdr.Seq = uint32(sel); sel&2 > 0 && len(r.seqs) > 0 {
		hdr.Seq = r.seqs[len(r.seqs)-1-int(sel>>2)%len(r.seqs)]
	}
	if hdr.Verdict = verdict(r.byte() % 6); sel&4 > 0 {
		hdr.Digest = r.n.digest()
	} else if sel&8 > 0 {
		hdr.Digest = uint64(sel)
	}
	hdr.Query, hdr.Reply, hdr.More = uint32(sel>>5), reply(sel>>4%6), sel&16 > 0
	return hdr
}

func (r *rig) update() update {
	sel := r.byte()
	m := Member{Name: r.name(), Status: Status(r.byte() % 8)}
	u := update{}
	inc, raised := r.incarnation(m.Name)
	m.Incarnation, m.Instance = inc, inc-raised
	m.Addr = rigAddr(1 + slices.Index(rigNames[1:], m.Name))
	if e := r.n.table.get(m.Name); e != nil {
		m.Addr = e.Addr
	}
	switch sel % 8 {
	case 0:
		m.Addr = rigAddr(r.pick(rigPeers))
	case 1:
		m.Addr = netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1%eth0"), uint16(sel))
	}
	switch {
	case sel&8 > 0:
		m.Tags = Tags("t=" + strings.Repeat("t", []int{1, maxTags - 2, maxTags + 1, 900}[sel>>4%4]))
	case sel&16 > 0:
		u.Name, u.Payload, u.LTime = strings.Repeat("e", 1+int(sel>>6)*255), make([]byte, 4*r.pick(256)), uint64(r.byte())
		if u.Coalesce = sel&32 > 0; u.Coalesce {
			u.LTime = 1 << (u.LTime % 64)
		}
		if e := r.n.table.get(m.Name); e != nil {
			m.Instance = e.Instance
			u.Number = e.eventCount() + uint64(r.byte()%8)
		}
		u.Timeout = uint32(r.byte()) * 100
	case sel&32 > 0:
		u.Age = 1 << (r.byte() % 64)
		u.Former = m.Instance - uint64(r.byte()%4)
		u.FormerNumber = 1 << (r.byte() % 64)
	case sel&64 > 0:
		u.Payload = make([]byte, 5*int(r.byte()))
	}
	u.Member = m
	return u
}

// message is a head and some updates, sometimes with damage.
func (r *rig) message(hdr header) []byte {
	how := r.byte()
	var us []update
	for range how % 4 {
		us = append(us, r.update())
	}
	b := wire.encode(nil, &hdr, us...)
	if how>>4 == 15 {
		r.damage(b)
	}
	return b
}

func (r *rig) damage(b []byte) {
	if len(b) == 0 {
		return
	}
	for range 1 + r.pick(3) {
		b[(r.pick(256)*5+r.pick(256))%len(b)] ^= 1 << r.pick(8)
	}
}

func (r *rig) step() {
	switch op := r.byte() % 24; op {
	default:
		hdr := r.head()
		r.datagram(r.source(hdr.From), r.message(hdr))
	case 0:
		n := r.pick(256)
		b := r.in[:min(len(r.in), n)]
		r.in = r.in[len(b):]
		r.datagram(r.source("a"), b)
	case 1, 2:
		if len(r.sealed) > 0 {
			b := bytes.Clone(r.sealed[r.pick(len(r.sealed))])
			if op == 2 {
				r.damage(b)
			}
			r.datagram(r.source("a"), b)
		}
	case 3, 4, 5: // a peer syncs with the node, or the other way round
		if len(r.tables) < 16 {
			with := Member{Name: r.name(), Instance: 1000, Addr: rigAddr(1)}
			r.tables = append(r.tables, &rigTable{stateSync{peer: with}, op == 3})
		}
		x := r.tables[r.pick(len(r.tables))]
		hdr := r.head()
		if x.dialled && op == 3 {
			about := []update{r.update()}
			about[0].Member.Name = r.n.self.Name
			r.tell(func(n *node) { n.handleWelcome(&x.stateSync, hdr, about) })
			break
		}
		if hdr.Kind = msgTable; hdr.More {
			hdr.Target = r.name()
		}
		r.table(x, r.message(hdr))
	case 6:
		if len(r.tables) > 0 && len(r.pieces) > 0 {
			r.table(r.tables[r.pick(len(r.tables))], r.pieces[r.pick(len(r.pieces))])
		}
	case 7:
		if len(r.tables) > 0 {
			i := r.pick(len(r.tables))
			r.tell(func(n *node) { n.syncDone(&r.tables[i].stateSync) })
			r.tables = slices.Delete(r.tables, i, i+1)
		}
	case 8: // a link ends
		name, tries := r.name(), r.pick(6)
		if e := r.n.table.get(name); e != nil {
			r.tell(func(n *node) { n.detector.linkEnded(n, e.Member, tries) })
		}
	case 9:
		if len(r.looks) > 0 {
			m, v := r.looks[r.pick(len(r.looks))], []verdict{verdictNone, verdictRefused, verdictSilent, verdictAlive}[r.pick(4)]
			w := header{From: r.name(), Incarnation: 1000}
			r.tell(func(n *node) { n.detector.handleTCPProbeResult(n, m, v, w) })
		}
	case 10:
		r.mode[1+r.pick(rigPeers-1)] = peerMode(r.byte() % 4)
	case 11:
		var addrs []netip.AddrPort
		for range r.pick(4) {
			addrs = append(addrs, rigAddr(r.pick(rigPeers)))
			r.may[addrs[len(addrs)-1]] = true
		}
		if r.trying {
			r.trying = false
			errs, names := []string{fmt.Sprint(addrs)}, []string{r.name()}
			r.tell(func(n *node) { n.joining.handleSeedTried(n, 0, seedResult{names: names[:len(addrs)%2], errs: errs}) })
		}
	case 12:
		size, how := r.pick(256), r.byte()
		for i := range 1 + int(how>>2) {
			name := "deploy" + strconv.Itoa(i%int(1+how&2))
			if how&1 > 0 {
				r.tell(func(n *node) { n.queries.ask(n, "load", make([]byte, 6*size), nil, time.Second) })
				break
			}
			r.tell(func(n *node) { n.userEvent(name, make([]byte, 6*size), how&2 > 0) })
		}
	case 13:
		name, prune := r.name(), r.byte()&1 > 0
		r.tell(func(n *node) { n.forceLeave(name, prune) })
	case 14: // a crowd, or checks of all of it
		from, much := r.byte(), r.byte()
		source := r.source("a")
		for i := range 40 {
			m := fmt.Sprintf("m%03d", from+byte(i))
			if much&1 == 0 {
				r.flood(update{Member: Member{Name: m, Addr: rigAddr(300 + int(from) + i), Incarnation: 1000, Instance: 1000, Status: statusAlive}})
				continue
			}
			hdr := header{Kind: msgIndirectProbe, Target: m, Seq: uint32(i) + uint32(much)<<8}
			if much&2 > 0 {
				hdr.Target = fmt.Sprintf("m%03d", from)
			}
			r.datagram(source, r.from("a", hdr))
		}
	case 15:
		if r.byte()%8 == 0 {
			r.tell(func(n *node) { n.identity.startLeave(n) })
		} else { // the process is stopped for a while
			r.now += time.Duration(r.byte()) * 100 * ms
		}
	case 16, 17, 18:
		r.pass([]time.Duration{ms, 20 * ms, 100 * ms, 150 * ms, 350 * ms, 600 * ms, time.Second, 3 * time.Second, 10 * time.Second, 25 * time.Second}[r.pick(10)])
	}
	r.note()
	if r.byte()&3 > 0 { // else more arrives before the loop gets to ticking
		r.settle()
	}
}

// ---- inputs, as the loop would hand them in ----

func (r *rig) tell(input func(n *node)) {
	r.n.step(r.now, input)
	r.note()
}

func (r *rig) datagram(from netip.AddrPort, b []byte) {
	if len(b) > maxDatagram-sealSize {
		return
	}
	r.sealed = append(r.sealed[max(0, len(r.sealed)-200):], b)
	r.got[from] += len(b)
	var hdr header
	if rest, err := wire.decode(b, &hdr); err == nil {
		if e := r.n.table.get(hdr.From); e != nil && e.Instance == hdr.instance() {
			r.claims(wire.decodeAll(rest))
		}
	}
	r.tell(func(n *node) { n.handleDatagram(from, b, len(b)%7 == 0) })
}

// from is a datagram as member name writes it.
func (r *rig) from(name string, hdr header, us ...update) []byte {
	hdr.From, hdr.Incarnation = name, 1000
	if e := r.n.table.get(name); e != nil {
		hdr.Incarnation, hdr.Raised = e.Incarnation, e.Incarnation-e.Instance
	}
	r.numbers[name]++
	hdr.Number = r.numbers[name]
	return wire.encode(nil, &hdr, us...)
}

// claims: where a member is said to live it may be asked, also if another claim of
// the same message says otherwise.
func (r *rig) claims(us []update, _ error) {
	for _, u := range us {
		r.may[netip.AddrPortFrom(u.Member.Addr.Addr().Unmap(), u.Member.Addr.Port())] = true
	}
}

// flood has member a tell of u.
func (r *rig) flood(u update) { r.datagram(rigAddr(1), r.from("a", header{Kind: msgBroadcast}, u)) }

// table hands in a piece of a table.
func (r *rig) table(x *rigTable, b []byte) {
	r.pieces = append(r.pieces[max(0, len(r.pieces)-100):], b)
	var hdr header
	rest, err := wire.decode(b, &hdr)
	us, uerr := wire.decodeAll(rest)
	if err != nil || uerr != nil {
		return
	}
	r.claims(us, nil)
	r.tell(func(n *node) {
		if _, _, err := n.mergeChunk(&x.stateSync, hdr, us); err != nil {
			return
		}
		for more := true; more; {
			var frame []byte
			if frame, more = n.tableChunk(&x.stateSync); len(frame) > maxFrame {
				r.t.Fatalf("a frame of %d bytes", len(frame))
			}
			r.pieces = append(r.pieces, frame)
			if x.dialled {
				break
			}
		}
	})
}

// note remembers whom the node may speak to: those it was told are members,
// and where a conflict is said to live.
func (r *rig) note() {
	for _, e := range r.n.table.ordered {
		r.may[e.Addr] = true
	}
	for _, p := range r.n.detector.probes {
		r.may[p.m.Addr] = true
	}
}

// settle ticks until the node wants to sleep and nobody answers any more.
func (r *rig) settle() time.Duration {
	for ticks := 0; ; ticks++ {
		o := r.n.tick(r.now)
		r.check(o)
		if r.over {
			return r.now + time.Hour
		}
		r.react(o)
		if len(r.todo) == 0 && o.wake > r.now {
			return o.wake
		}
		if len(r.todo) > 0 {
			ticks = 0
		} else if ticks > 20 {
			r.t.Fatalf("it wants to be woken at once for ever")
		}
		for _, f := range r.todo[:min(len(r.todo), 1000)] {
			f()
		}
		r.todo = nil
	}
}

// pass lets d pass. Peers that answer send heartbeats, dials come to their end.
func (r *rig) pass(d time.Duration) {
	ticks := 0
	for end := r.now + d; !r.over; ticks++ {
		if r.now >= r.beatAt {
			r.beatAt = r.now + 500*ms
			for i := 1; i < rigPeers; i++ {
				if r.mode[i] == peerAnswers {
					r.datagram(rigAddr(i), r.from(rigNames[i], header{Kind: msgHeartbeat, Promise: 600, Digest: r.n.digest()}))
				}
			}
		}
		wake := r.settle()
		if r.now >= end {
			break
		}
		r.now = min(end, max(wake, r.now+ms/10), max(r.beatAt, r.now+ms))
	}
	if limit := 200 + int(2000*d/time.Second); ticks > limit && d > 100*ms {
		r.t.Fatalf("%d ticks in %v", ticks, d)
	}
}

// react carries outputs out, and lets peers answer that do.
func (r *rig) react(o outputs) {
	r.trying = r.trying || len(o.seeds) > 0
	for _, p := range o.packets {
		r.sealed = append(r.sealed[max(0, len(r.sealed)-200):], p.data)
		var hdr header
		wire.decode(p.data, &hdr)
		if hdr.Seq == 0 || hdr.Kind == msgAck {
			continue
		}
		r.seqs = append(r.seqs[max(0, len(r.seqs)-32):], hdr.Seq)
		if i := rigPeer(p.to.Addr); r.mode[i] == peerAnswers {
			a, about := header{Kind: msgAck, Seq: hdr.Seq}, []update(nil)
			if e := r.n.table.get(hdr.Target); hdr.Kind == msgIndirectProbe && e != nil {
				a = header{Kind: msgProbeResult, Seq: hdr.Seq, Target: hdr.Target, Verdict: verdictAlive}
				about = []update{{Member: e.Member}}
			}
			r.todo = append(r.todo, func() { r.datagram(rigAddr(i), r.from(rigNames[i], a, about...)) })
		}
	}
	for _, l := range o.tcpProbes {
		r.looks = append(r.looks[max(0, len(r.looks)-64):], l)
		v := verdictNone
		switch r.mode[rigPeer(l.Addr)] {
		case peerAnswers:
			v = verdictAlive
		case peerSilent:
			v = verdictSilent
		case peerRefuses:
			v = verdictRefused
		default:
			continue
		}
		r.todo = append(r.todo, func() {
			r.tell(func(n *node) { n.detector.handleTCPProbeResult(n, l, v, header{From: l.Name, Incarnation: l.Instance}) })
		})
	}
	for _, ev := range o.events {
		if ev.kind == eventQuery && r.byte()&1 > 0 {
			r.todo = append(r.todo, func() { r.tell(func(n *node) { n.queries.sendReply(n, ev, replyDone, make([]byte, maxPayload)) }) })
		}
	}
}

// ---- what must hold ----

func (r *rig) check(o outputs) {
	r.note()
	r.checkTable()
	r.checkBounds()
	for _, ev := range o.events {
		r.checkEvent(ev)
	}
	for _, p := range o.packets {
		if len(p.data) > maxDatagram-sealSize {
			r.t.Fatalf("a packet of %d bytes", len(p.data))
		}
		to := p.to.Addr
		if r.sent[to] += len(p.data); !r.may[to] && r.sent[to] > r.got[to] {
			var hdr header
			wire.decode(p.data, &hdr)
			r.t.Fatalf("%v got %d bytes for %d: %+v", to, r.sent[to], r.got[to], hdr)
		}
	}
	for _, l := range o.tcpProbes {
		if !r.may[l.Addr] {
			r.t.Fatalf("it looks at %v", l)
		}
	}
	for _, m := range slices.Concat(o.links, o.syncs) {
		if !r.may[m.Addr] {
			r.t.Fatalf("it dials %v", m)
		}
	}
	if o.wake < r.now {
		r.t.Fatalf("it wants to be woken in the past")
	}
	o.logs = slices.DeleteFunc(o.logs, func(l logLine) bool { return l.level <= levelDebug })
	if len(o.logs) > 20 {
		r.t.Fatalf("%d log lines: %s", len(o.logs), o.logs[0])
	}
	if o.fatal != nil && !strings.Contains(o.fatal.Error(), "taken") {
		r.t.Fatal(o.fatal)
	}
	r.over = o.fatal != nil || o.left
}

func (r *rig) checkTable() {
	n, tb := r.n, r.n.table
	if n.self != tb.get(n.self.Name) || n.self.Status != statusAlive || n.self.local.isolated || n.self.local.reaped {
		r.t.Fatalf("it thinks of itself as %+v", n.self)
	}
	digest, alive, failed, total := uint64(0), 0, 0, 0
	for i, e := range tb.ordered {
		if i > 0 && tb.ordered[i-1].Name >= e.Name || tb.get(e.Name) != e {
			r.t.Fatalf("entry %q is not the one of its name, or out of order", e.Name)
		}
		if e.Incarnation < r.incs[e] {
			r.t.Fatalf("the incarnation of %s fell from %d to %d", e.Name, r.incs[e], e.Incarnation)
		}
		if e.Incarnation > r.incs[e] && (validName(e.Name) != nil || len(e.Tags) > maxTags || !e.Addr.IsValid()) {
			r.t.Fatalf("a bad claim got in: %+v", e.Member)
		}
		r.incs[e] = e.Incarnation
		if !e.local.reaped {
			digest ^= e.digest()
			if e.Status < statusLeft {
				total++
			}
			if e.displayStatus() == statusFailed {
				failed++
			}
		}
		if !e.Status.isDead() {
			alive++
		}
	}
	if tb.digest != digest || tb.failed != failed || tb.total != total {
		r.t.Fatalf("the sums are not those of the table: %x %x, %d %d, %d %d", tb.digest, digest, tb.failed, failed, tb.total, total)
	}
	for i := range tb.ring {
		if len(tb.ring[i]) != alive || !slices.IsSortedFunc(tb.ring[i], func(a, b *entry) int { return cmp.Compare(a.pos[i], b.pos[i]) }) {
			r.t.Fatalf("ring %d has %d of %d members, or in bad order", i, len(tb.ring[i]), alive)
		}
	}
}

func (r *rig) checkBounds() {
	n, members := r.n, len(r.n.table.ordered)
	bound := func(what string, is, limit int) {
		if is > limit {
			r.t.Fatalf("%d %s, the limit is %d", is, what, limit)
		}
	}
	bound("members", members, maxMembers)
	bound("probes", len(n.detector.probes), maxProbes+1)
	bound("questions", len(n.requests.open), maxRequests)
	bound("floods", len(n.broadcasts.claims.queue), maxQueue)
	bound("floods of events", len(n.broadcasts.news.queue), maxQueue)
	bound("gaps", len(n.broadcasts.gaps), maxEvents)
	for _, e := range n.table.ordered {
		if e.events != nil {
			bound("events that wait for their turn", len(e.events.held), eventWindow)
			bound("remembered numbers", len(e.events.recent), eventWindow*maxVariants+1)
		}
	}
	bound("events", len(n.broadcasts.events.recent), maxEvents)
	for _, s := range n.joining.seeds {
		bound("a seed's names", len(s.last.names), 64+4)
	}
	bound("queries", len(n.queries.open), maxQueries)
	for _, e := range n.table.ordered {
		bound("queries of a peer", len(e.peer().seenQueries), maxHeardOfPeer)
		bound("questions to a peer", e.peer().requests, maxRequestsToPeer)
	}
	for _, ev := range n.broadcasts.events.recent {
		bound("bytes of an event", len(ev.Name)+len(ev.Payload), maxPayload)
	}
	for _, f := range slices.Concat(n.broadcasts.claims.queue, n.broadcasts.news.queue) {
		bound("bytes of a flood", len(f), maxPayload+maxName+60)
	}
	for _, p := range n.detector.probes {
		bound("votes", len(p.results), members+300)
	}
}

// checkEvent: per member, events alternate.
func (r *rig) checkEvent(ev Event) {
	name, was := ev.Member.Name, r.told[ev.Member.Name]
	alive := was == eventJoin
	ok := true
	switch ev.kind {
	case eventUser, eventQuery:
		if len(ev.Name)+len(ev.Payload) > maxPayload {
			r.t.Fatalf("a %v of %d bytes", ev.kind, len(ev.Name)+len(ev.Payload))
		}
		return
	case eventAnswer:
		return
	case eventJoin:
		ok = !alive
	case eventFailed:
		ok = alive
	case eventUpdate:
		ok = alive
		ev.kind = eventJoin
	case eventLeave:
		ok = was != eventLeave
	case eventReap: // a reaped member may be heard of again as failed, without an event
		ok = !alive
	}
	if name == r.n.self.Name {
		ok = ok && ev.kind == eventJoin
	}
	if !ok {
		r.t.Fatalf("%v of %s after %v", ev.kind, name, was)
	}
	r.told[name] = ev.kind
}

// FuzzNode: whatever peers say, repeat, garble and fail to answer, the node
// stays a member: alive to itself, one entry a name, no incarnation ever falls,
// memory, packets and wake-ups are bounded, no peer is answered with more than
// it sent, and when all is over it still answers.
func FuzzNode(f *testing.F) {
	for i := range 60 {
		rng := rand.New(rand.NewPCG(uint64(i), 6))
		b := make([]byte, 100+10*i)
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(t, in)
		for steps := 0; len(r.in) > 0 && steps < 150 && r.now < 90*time.Second && !r.over; steps++ {
			r.step()
		}
		r.aftermath()
	})
}

// aftermath: when the attack is over and nobody answers, nothing is left open,
// and a ping is answered at once.
func (r *rig) aftermath() {
	r.mode = [rigPeers]peerMode{}
	r.pass(5 * time.Second)
	if r.over {
		return
	}
	if n := r.n; len(n.queries.open) > 0 && n.queries.open[0].until < n.now {
		r.t.Fatal("a query has not ended")
	}
	hdr := header{Kind: msgPing, From: rigNames[7], Incarnation: 1000, Target: r.n.self.Name, Seq: 77, Digest: 1 << 63, Number: 1}
	b := wire.encode(nil, &hdr)
	r.n.step(r.now, func(n *node) { n.handleDatagram(rigAddr(7), b, true) })
	for _, p := range r.n.tick(r.now).packets {
		var a header
		if wire.decode(p.data, &a); a.Kind == msgAck && a.Seq == 77 && p.to.Addr == rigAddr(7) {
			return
		}
	}
	r.t.Fatal("a ping is not answered")
}

// crowd tells the node of count more members, m000 and so on.
func (r *rig) crowd(count int) {
	for i := range count {
		r.flood(update{Member: Member{Name: fmt.Sprintf("m%03d", i), Addr: rigAddr(300 + i), Incarnation: 1000, Instance: 1000, Status: statusAlive}})
	}
	r.settle()
}

func TestProbesForAPeerOfAllMembersLeaveTheNodeItsOwn(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	r.crowd(2 * maxProbes)
	for i := range 2 * maxProbes {
		r.datagram(rigAddr(1), r.from("a", header{Kind: msgIndirectProbe, Target: fmt.Sprintf("m%03d", i), Seq: uint32(i)}))
	}
	for i := range 100 { // of the same member
		r.datagram(rigAddr(1), r.from("a", header{Kind: msgIndirectProbe, Target: "m000", Seq: uint32(1000 + i)}))
	}
	r.mode = [rigPeers]peerMode{} // nobody answers any more
	for _, w := range r.n.heartbeats.watched {
		w.peer().due = r.n.now
	}
	if r.settle(); len(r.n.heartbeats.watched) == 0 {
		t.Fatal("the node watches nobody")
	}
	for _, w := range r.n.heartbeats.watched {
		if r.n.detector.ownProbe(w) == nil {
			t.Errorf("%s is overdue and not probed", w.Name)
		}
	}
	r.pass(2 * time.Second) // counts the wake-ups
}

func TestBroadcastsThatCannotBeSentAreNotKept(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	for i := range 2 * maxQueue {
		r.n.broadcasts.claims.add(&update{Member: Member{Name: strconv.Itoa(i)}})
	}
	r.checkBounds()
}

// A table without an end would hold the place of an exchange for ever.
func TestTableThatGoesBackIsCutOff(t *testing.T) {
	r := newRig(t, []byte{3 << 2})
	sync := &stateSync{peer: Member{Name: "a", Instance: 1000}}
	for _, step := range []struct {
		upto string
		ok   bool
	}{{"b", true}, {"b", false}, {"a", false}, {"c", true}} {
		claims := []update{{Member: labMember(3)}}
		if _, _, err := r.n.mergeChunk(sync, header{Kind: msgTable, More: true, Target: step.upto}, claims); (err == nil) != step.ok {
			t.Errorf("up to %s: %v", step.upto, err)
		}
	}
	if _, _, err := r.n.mergeChunk(sync, header{Kind: msgTable, More: true, Target: "d"}, nil); err == nil {
		t.Error("a piece that brings nothing is taken, and others may follow")
	}
}

func TestTableOfAStrangerWithANamesakeMakesTheNodeJoinNobody(t *testing.T) {
	r := newRig(t, nil)
	sync := &stateSync{peer: Member{Name: "a", Instance: 1000}}
	m := Member{Name: "n", Addr: rigAddr(2), Incarnation: 900, Instance: 900, Status: statusAlive}
	r.tell(func(n *node) { n.mergeChunk(sync, header{Kind: msgTable}, []update{{Member: m}}) })
	frame, _ := r.n.tableChunk(sync)
	if _, us := (&sim{}).frame(frame); len(us) > 0 {
		t.Errorf("while it is found out whose the name is, it tells of %+v", us[0].Member)
	}
	r.pass(time.Second)
	if len(r.n.detector.probes) > 0 || r.n.identity.former.Addr != m.Addr {
		t.Errorf("the namesake was not found gone: %+v", r.n.identity)
	}
}

func TestBroadcastLeavesOutWhatIsAddedToAClaimOrAnEvent(t *testing.T) {
	r := newRig(t, []byte{2 << 2})
	failed := r.n.table.get("b").with(statusFailed) // of which b itself is told
	table := r.from("a", header{Kind: msgTable}, update{Member: failed, Payload: make([]byte, 9000)})
	r.table(&rigTable{stateSync: stateSync{peer: Member{Name: "a", Instance: 1000}}}, table)
	m := Member{Name: "c", Addr: rigAddr(3), Incarnation: 9, Instance: 9, Status: statusAlive}
	r.flood(update{Member: m, Payload: make([]byte, 1201)})
	r.flood(update{Member: Member{Name: "a", Instance: 1000, Tags: Tags(strings.Repeat("t", 400))}, Name: "deploy", LTime: 1, Number: 1})
	had := len(r.sealed)
	r.pass(20 * ms)
	for _, b := range r.sealed[had:] {
		if len(b) > 200 {
			t.Errorf("%d bytes are sent", len(b))
		}
	}
	if r.n.table.get("c") == nil {
		t.Error("the claim itself is not believed")
	}
}

func TestDigestIsRightWhenAForgottenMemberComesBack(t *testing.T) {
	r := newRig(t, []byte{1 << 2})
	m := r.n.table.get("a").Member
	m.Status = statusFailed
	r.n.applyAndForward(&update{Member: m})
	r.pass(r.n.cfg.reapAfter + 3*time.Second)
	if !r.n.table.get("a").local.reaped {
		t.Fatal("a is not forgotten yet")
	}
	m.Status, m.Incarnation = statusAlive, m.Incarnation+1
	r.n.applyAndForward(&update{Member: m})
	r.settle() // compares
}

func TestReplayOfAnAnswerRevivesNoFailedMember(t *testing.T) {
	r := newRig(t, []byte{5 << 2})
	a := r.n.table.get("a")
	for range 3 {
		r.n.ping(a.Member)
		r.pass(time.Second)
	}
	recorded := slices.Clone(r.sealed)
	r.mode = [rigPeers]peerMode{}
	r.pass(8 * time.Second)
	if a.displayStatus() != statusFailed || !a.local.isolated {
		t.Fatalf("a is %v", a.displayStatus())
	}
	for _, b := range recorded {
		r.datagram(a.Addr, b)
		r.settle()
		if a.displayStatus() != statusFailed {
			t.Fatalf("revived by %s", (&lab{t: t}).say(b))
		}
	}
}

// A member that everybody has forgotten was brought back by its own recorded
// datagrams, and kept alive by its recorded heartbeats.
func TestReplayRevivesNoForgottenMember(t *testing.T) {
	r := newRig(t, []byte{2 << 2})
	b := r.n.table.get("b").Member
	r.pass(3 * time.Second)
	recorded := slices.Clone(r.sealed)
	dead := b
	dead.Status = statusFailed
	r.flood(update{Member: dead})
	r.mode[2] = peerAbsent
	r.pass(2*r.n.cfg.reapAfter + 3*time.Second)
	if r.n.table.get("b") != nil {
		t.Fatal("b is not forgotten")
	}
	for range 3 {
		for _, d := range recorded {
			r.datagram(b.Addr, d)
			r.pass(20 * ms)
		}
	}
	if e := r.n.table.get("b"); e != nil {
		t.Errorf("b is back: %+v", e.Member)
	}
}

// One recorded datagram, twice a second, kept a node from noticing that it is
// cut off.
func TestReplayDoesNotHideThatTheNodeIsIsolated(t *testing.T) {
	r := newRig(t, []byte{3 << 2})
	r.pass(2 * time.Second)
	recorded := slices.Clone(r.sealed)
	r.mode = [rigPeers]peerMode{}
	for i := range 8 {
		r.datagram(rigAddr(1), recorded[len(recorded)-1-i%3])
		r.pass(500 * ms)
	}
	if !r.n.detector.isolated {
		t.Error("it has not noticed")
	}
}

// 4,000 forged suspects held an agent at full load for half a minute.
func TestSuspectsForgedInAFullTableCostLittle(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	for i := range maxMembers - 10 {
		m := Member{Name: fmt.Sprintf("m%05d", i), Addr: rigAddr(300 + i), Incarnation: 1000, Instance: 1000, Status: statusAlive}
		r.n.table.apply(r.n.now, m, 0)
		if m.Status = statusSuspect; i%3 == 0 {
			r.n.table.apply(r.n.now, m, 0)
		}
	}
	r.n.tick(r.now)
	r.n.table.events = nil
	began, ticks := time.Now(), 0
	for i := range 200 { // each datagram names twenty more
		var us []update
		for k := range 20 {
			us = append(us, update{Member: Member{Name: fmt.Sprintf("m%05d", (i*20+k)*3+1), Addr: rigAddr(300 + (i*20+k)*3 + 1), Incarnation: 1000, Instance: 1000, Status: statusSuspect}})
		}
		b := r.from("a", header{Kind: msgBroadcast}, us...)
		r.n.step(r.now, func(n *node) { n.handleDatagram(rigAddr(1), b, false) })
		r.n.tick(r.now)
		r.now += ms
		ticks++
	}
	each := time.Since(began) / time.Duration(ticks)
	t.Logf("%v a datagram with 20 suspects among %d members", each.Round(time.Microsecond), len(r.n.table.ordered))
	if each > 50*ms {
		t.Errorf("%v each", each)
	}
	r.checkBounds()
}

// ---- conversations with strangers ----

// heardQueries counts the queries that handlers were told of.
func (l *lab) heardQueries() int { return strings.Count(l.text.String(), "event query") }

// asks hands in a query of member from, and returns the datagram.
func (l *lab) asks(from int, id, timeout uint32) []byte {
	hdr := l.head(from, header{Kind: msgQuery, Query: id, Seq: id})
	b := wire.encode(nil, &hdr, update{Member: Member{Name: hdr.From}, Name: "go", LTime: 5, Timeout: timeout})
	l.raw(from, b)
	return b
}

// quiet has all others tell the node that they are well, and lets d pass, in small steps.
func (l *lab) quiet(count int, d time.Duration, but ...int) {
	for end := l.now + d; l.now < end; {
		for i := 1; i < count; i++ {
			if !slices.Contains(but, i) {
				beat := l.head(i, header{Kind: msgHeartbeat, Promise: 2500, Digest: l.n.digest()})
				l.n.step(l.now, func(n *node) { n.handleDatagram(labMember(i).Addr, wire.encode(nil, &beat), false) })
			}
		}
		l.after(min(2*time.Second, end-l.now))
	}
}

func TestReplayIsNotReopenedByALateAnswer(t *testing.T) {
	l := newLab(t, 3)
	l.breaks(1) // a question to b
	late := l.head(1, header{Kind: msgAck, Seq: l.seqs["b"]})
	for range windowSize + 2 { // b goes on
		l.udp(1, header{Kind: msgBroadcast})
	}
	recorded := l.asks(1, 7, 1000)
	l.after(2500 * ms) // the query's time is over; the question's is not
	l.raw(1, wire.encode(nil, &late))
	l.raw(1, recorded)
	if l.heardQueries() != 1 {
		t.Errorf("it was heard %d times:\n%s", l.heardQueries(), l.text.String())
	}
}

// A run that was forgotten may come back: after a split that lasted, or when another run had its name for a while. Its
// window was empty then, and all that was recorded before counted again.
func TestReplayCountsForNothingAfterItsSenderWasForgotten(t *testing.T) {
	for what, forget := range map[string]func(l *lab, b Member){
		"reaped": func(l *lab, b Member) {
			l.n.step(l.now, func(n *node) { n.applyAndBroadcast(b.with(statusFailed)) })
			l.quiet(3, 2*time.Hour+2*time.Second, 1)
			if l.n.table.get("b") != nil {
				t.Fatal("b is not forgotten")
			}
		},
		"another run had its name": func(l *lab, b Member) {
			b.Instance, b.Incarnation = 11, 11
			l.n.step(l.now, func(n *node) { n.applyAndBroadcast(b) })
		},
		"dropped for a newcomer": func(l *lab, b Member) {
			l.n.step(l.now, func(n *node) {
				n.applyAndBroadcast(b.with(statusFailed))
				n.table.dropOldest(n.now)
			})
		},
	} {
		l := newLab(t, 3)
		recorded := l.asks(1, 7, 1000)
		l.quiet(3, 2*time.Second)
		back := labMember(1)
		forget(l, back)
		back.Incarnation = 12
		l.n.step(l.now, func(n *node) { n.applyAndBroadcast(back) })
		l.raw(1, recorded)
		if l.heardQueries() != 1 {
			t.Errorf("%s: a recording is heard", what)
		}
		if l.n.now-l.n.detector.lastHeard < ms && what != "reaped" {
			t.Errorf("%s: a recording counts as life", what)
		}

		// What b sends now is heard as soon as it has answered.
		l.after(time.Second)
		hdr := header{Kind: msgQuery, Query: 8, Seq: 8, From: "b", Incarnation: 12, Raised: 2}
		q := update{Member: Member{Name: "b"}, Name: "go", LTime: 6, Timeout: 1000}
		l.udp(1, hdr, q)
		l.udp(1, header{Kind: msgAck, Seq: l.seqs["b"], From: "b", Incarnation: 12, Raised: 2})
		l.udp(1, hdr, q)
		if l.heardQueries() != 2 {
			t.Errorf("%s: b is not heard any more:\n%s", what, l.text.String())
		}
	}
}

// A member that the node never asks anything was mute for good after one forged datagram of 37 bytes.
func TestQueryIsNotMutedByAForgedNumber(t *testing.T) {
	for _, kind := range []msgKind{msgHeartbeat, msgPing, msgBroadcast, msgQuery} {
		l := newLab(t, 2)
		forged := header{Kind: kind, From: "b", Incarnation: 10, Number: 1 << 60, Target: "a", Digest: 1}
		l.raw(1, wire.encode(nil, &forged))
		l.text.Reset()
		for range 1000 { // its queries: each is sent again until it is acknowledged
			l.asks(1, 8, 10000)
		}
		if pings := strings.Count(l.text.String(), "to b: ping b"); pings != 1 {
			t.Errorf("%d pings for 1,000 datagrams that do not count", pings)
		}
		l.udp(1, header{Kind: msgAck, Seq: l.seqs["b"]})
		l.asks(1, 8, 10000)
		if l.heardQueries() != 1 {
			t.Errorf("kind %d: heard %d times", kind, l.heardQueries())
		}
	}
}

// Heartbeats that were held back, and are played one by one, kept a dead member alive for twenty minutes: what its answers
// have overtaken does not count. (Half a minute's worth may: that many numbers the window holds.)
func TestHeartbeatsHeldBackKeepADeadMemberAliveForAMomentOnly(t *testing.T) {
	l := newLab(t, 2)
	var held [][]byte
	for range 600 { // for twenty minutes b's heartbeats are held back, and its answers are not
		for range 3 {
			l.head(1, header{}) // to others
		}
		beat := l.head(1, header{Kind: msgHeartbeat, Promise: 2000})
		held = append(held, wire.encode(nil, &beat))
		for range 40 {
			l.after(50 * ms)
			for _, q := range slices.Clone(l.n.requests.open) {
				l.udp(1, header{Kind: msgAck, Seq: q.h.Seq})
			}
		}
	}
	if l.n.table.get("b").displayStatus() != statusAlive {
		t.Fatal("b is not alive")
	}
	died := l.now
	for _, beat := range held[len(held)-windowSize/4:] { // those that may still count
		for l.n.detector.ownProbe(l.n.table.get("b")) == nil && l.n.table.get("b").displayStatus() == statusAlive {
			l.after(100 * ms)
		}
		l.raw(1, beat)
		if l.n.table.get("b").displayStatus() == statusFailed {
			break
		}
		l.after(100 * ms)
	}
	for l.n.table.get("b").displayStatus() != statusFailed && l.now < died+time.Hour {
		l.after(time.Second)
	}
	t.Logf("called failed %v after its death", l.now-died)
	if l.now-died > time.Minute {
		t.Errorf("it lives on for %v", l.now-died)
	}
}

// A forged promise hid a lost host for a minute.
func TestHeartbeatPromiseIsBelievedForACycleAtMost(t *testing.T) {
	for _, promise := range []uint32{1, 500, 2500, 2501, 60000, 1 << 31, 1<<32 - 1} {
		l := newLab(t, 2)
		l.udp(1, header{Kind: msgHeartbeat, Promise: promise})
		want := min(time.Duration(promise)*ms, maxPromise) + overdueAfter
		if due := l.n.heartbeats.watched[0].peer().due - l.n.now; due != want {
			t.Errorf("after a promise of %d ms it is due in %v, want %v", promise, due, want)
		}
	}
	// No honest promise is longer, whatever others have been promised.
	for count := 2; count < 12; count++ {
		l := newLab(t, count)
		for l.now < 20*time.Second {
			l.now += 50 * ms
			for _, p := range l.n.tick(l.now).packets {
				var hdr header
				wire.decode(p.data, &hdr)
				if d := time.Duration(hdr.Promise) * ms; d > maxPromise {
					t.Fatalf("%d members: a promise of %v", count, d)
				}
			}
		}
	}
}

// One member's queries of an hour made all others deaf to everybody else's for that hour.
func TestQueriesOfOnePeerKeepNobodyElsesOut(t *testing.T) {
	l := newLab(t, 3)
	hour := uint32(time.Hour / ms)
	start := time.Now()
	for i := range 20000 {
		hdr := l.head(2, header{Kind: msgQuery, Query: uint32(i), Seq: uint32(i)})
		b := wire.encode(nil, &hdr, update{Member: Member{Name: "c"}, Name: "go", LTime: 5, Timeout: hour})
		l.n.step(l.now, func(n *node) { n.handleDatagram(labMember(2).Addr, b, false) })
	}
	l.n.tick(l.now)
	if each := time.Since(start) / 20000; each > ms {
		t.Errorf("%v a query", each)
	}
	if heard := len(l.n.table.get("c").peer().seenQueries); heard > maxHeardOfPeer {
		t.Errorf("%d queries are remembered", heard)
	}
	l.text.Reset()
	l.asks(1, 7, 1000)
	l.asks(2, 1<<20, 1000)
	l.asks(2, 1<<20, 1000)
	if l.heardQueries() != 2 {
		t.Errorf("%d of 2 new queries are heard", l.heardQueries())
	}
}

// Replies that nobody acknowledges are sent again for a minute, and held every place for what waits for an answer: also
// for the pings by which a member is found alive.
func TestRequestsOfOnePeerLeaveRoomForOthers(t *testing.T) {
	l := newLab(t, 3)
	ev := Event{update: update{Member: labMember(2), Timeout: 1 << 31}}
	for i := range 4 * maxRequestsToPeer {
		ev.id = uint32(i)
		l.n.step(l.now, func(n *node) { n.queries.sendReply(n, ev, replyDone, make([]byte, maxPayload)) })
	}
	if open := len(l.n.requests.open); open > maxRequestsToPeer {
		t.Errorf("%d replies to one peer wait", open)
	}
	l.breaks(1)
	l.udp(1, header{Kind: msgAck, Seq: l.seqs["b"]})
	if p := l.n.detector.ownProbe(l.n.table.get("b")); p != nil {
		t.Errorf("b has answered, and is still probed")
	}
	// Once they are over, there is room again.
	l.now += replyTimeout + time.Second
	l.n.out.wake = never - lateBy
	l.n.tick(l.now)
	open := len(l.n.requests.open)
	if counted := l.n.table.get("b").peer().requests + l.n.table.get("c").peer().requests; counted > open {
		t.Errorf("%d wait, and %d are counted", open, counted)
	}
}

func TestProbesForOnePeerLeaveRoomForOthers(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	r.crowd(2 * maxProbes)
	for i := range 2 * maxProbes {
		r.datagram(rigAddr(1), r.from("a", header{Kind: msgIndirectProbe, Target: fmt.Sprintf("m%03d", i), Seq: uint32(i + 1)}))
	}
	r.datagram(rigAddr(2), r.from("b", header{Kind: msgIndirectProbe, Target: "m000", Seq: 7}))
	for name, want := range map[string]int{"a": maxProbesForPeer, "b": 1} {
		got := 0
		for _, p := range r.n.detector.probes {
			if p.requester == r.n.table.get(name) {
				got++
			}
		}
		if got != want {
			t.Errorf("%d probes for %s, want %d", got, name, want)
		}
	}
}

// A recorded ping was answered as often as it was played. New ones of members are always answered.
func TestReplayOfAPingIsAnsweredAtABoundedRate(t *testing.T) {
	l := newLab(t, 3)
	l.after(time.Second)
	ping := func(hdr header) (answers int) {
		b := wire.encode(nil, &hdr)
		l.n.step(l.now, func(n *node) { n.handleDatagram(netip.MustParseAddrPort("203.0.113.9:9"), b, true) })
		for _, p := range l.n.tick(l.now).packets {
			var a header
			if wire.decode(p.data, &a); a.Kind != msgAck {
				continue
			}
			answers++
			if len(p.data) > len(b) {
				t.Fatalf("%d bytes are answered with %d", len(b), len(p.data))
			}
		}
		return answers
	}
	recorded := l.head(1, header{Kind: msgPing, Target: "a", Seq: 5, Digest: 1 << 62})
	stranger := header{Kind: msgPing, From: "x", Incarnation: 9, Number: 5, Target: "a", Seq: 5, Digest: 1 << 62}
	elsewhere := header{Kind: msgPing, From: "b", Incarnation: 10, Number: 5, Target: "z", Seq: 5, Digest: 1 << 62}
	answers := 0
	for range 5 * replayedPingRate {
		l.now += 100 * time.Microsecond
		answers += ping(recorded) + ping(stranger) + ping(elsewhere)
	}
	if limit := replayedPingRate*3/2 + 10; answers > limit {
		t.Errorf("%d answers in half a second, the limit is %d", answers, limit)
	}
	for range 100 { // under the flood
		if ping(l.head(2, header{Kind: msgPing, Target: "a", Seq: 6, Digest: 1 << 62})) != 1 {
			t.Fatal("a member's own ping is not answered")
		}
		ping(recorded)
	}
}

// Each dead name for which a full table made room cost a walk over all of it: 188 us, so that 345 kB/s took a processor.
func TestTableThatIsFullOfDeadNamesCostsLittle(t *testing.T) {
	l := newLab(t, 3)
	add := func(i int, s Status) *entry {
		m := labMember(5)
		m.Name, m.Status = fmt.Sprintf("%08x", mix(uint64(i))), s
		return l.n.table.apply(l.n.now+time.Duration(i), m, 0)
	}
	i := 0
	for ; len(l.n.table.ordered) < maxMembers; i++ {
		add(i, []Status{statusLeft, statusFailed, statusAlive}[i%3])
	}
	l.n.table.events = nil

	oldest := l.n.table.dead[0].e.Name
	if add(i, statusAlive) == nil || l.n.table.get(oldest) != nil {
		t.Error("a living newcomer does not take the place of the one that has been dead for longest")
	}
	// The measure is what one walk costs, on this machine as busy as it is.
	const names = 5000
	var walks, adds time.Duration
	living := 0
	for range names {
		start := time.Now()
		for _, e := range l.n.table.ordered {
			if !e.Status.isDead() {
				living++
			}
		}
		walked := time.Now()
		i++
		add(i, statusLeft)
		walks += walked.Sub(start)
		adds += time.Since(walked)
	}
	t.Logf("%v a dead name, %v a walk over %d living ones", adds/names, walks/names, living/names)
	if adds > walks/2 || len(l.n.table.ordered) != maxMembers {
		t.Errorf("%v each, %d names", adds/names, len(l.n.table.ordered))
	}

	// Only the living are left: no room, and no long search for it.
	for len(l.n.table.dead) > 0 {
		i++
		add(i, statusAlive)
	}
	start := time.Now()
	for range names {
		i++
		if add(i, statusAlive) != nil {
			t.Fatal("there is room in a full table")
		}
	}
	if refused := time.Since(start); refused > walks/2 {
		t.Errorf("%v to be refused", refused/names)
	}
}

// ---- real agents ----

// obeyable reports what a terminal could obey.
func obeyable(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsGraphic(r) }

func TestTerminalGetsNoEscapeSequencesOfAForgedPeer(t *testing.T) {
	const esc = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e\r\x7f\xff"
	logs := newLogWriter(levelDebug)
	r := newRig(t, []byte{1 << 2})
	m := Member{Name: "evil", Addr: rigAddr(3), Incarnation: 5, Instance: 5, Status: statusAlive, Tags: "k" + esc + "=v" + esc + "\x00role=" + esc}
	r.flood(update{Member: m})
	bad := m
	bad.Name += esc
	r.flood(update{Member: bad})
	r.settle()
	ms := r.n.members("", 100)
	logs.log(logLine{levelInfo, "user-event: " + esc})
	for what, s := range map[string]string{"members": membersText(shown(ms...), true), "JSON": membersJSON(shown(ms...), true), "the log": <-logs.lines} {
		if i := strings.IndexFunc(s, obeyable); i >= 0 || !utf8.ValidString(s) {
			t.Errorf("%s shows %q", what, s[max(i, 0):])
		}
		if !strings.Contains(s, "owned") || what != "the log" && strings.Count(s, "evil") != 1 {
			t.Errorf("%s: %s", what, s)
		}
	}
}

// greeting dials g and says hello, as a peer without a key does.
func greeting(t testing.TB, g *gossip) (net.Conn, *session) {
	t.Helper()
	self, _ := g.self()
	c, err := net.Dial("tcp", self.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(8 * time.Second))
	return c, (&sealer{portKind: gossipPort}).handshake(&session{conn: c, dialled: true})
}

func TestAcceptorCutsStrangersOffAfterTwoSeconds(t *testing.T) {
	t.Parallel()
	g, l := startTestGossip(t, "red", gossipConfig{})
	self, _ := g.self()
	t.Cleanup(func() {
		if strings.Contains(l.String(), "[WARN]") { // a look whether the port is open is no news
			t.Errorf("logged:\n%s", l)
		}
	})
	for what, say := range map[string]func() net.Conn{
		"who says nothing":          func() net.Conn { c, _ := net.Dial("tcp", self.Addr.String()); return c },
		"who says half of a hello":  func() net.Conn { c, _ := net.Dial("tcp", self.Addr.String()); io.WriteString(c, helloLine); return c },
		"who says hello, no more":   func() net.Conn { c, _ := greeting(t, g); return c },
		"who is no member, as link": func() net.Conn { c, s := greeting(t, g); s.send(&header{Kind: msgLink, From: "x"}); return c },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			start, c := time.Now(), say()
			defer c.Close()
			c.SetReadDeadline(start.Add(10 * time.Second))
			io.Copy(io.Discard, c)
			if took := time.Since(start); took > 6*time.Second { // two, and patience with a busy machine
				t.Errorf("cut off after %v", took)
			}
		})
	}
}

// A recorded first frame of 93 bytes was answered with the whole table.
func TestHandshakeSaysNothingBeforeAChallengeIsAnswered(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{sealer: sealer{keys: [][]byte{bytes.Repeat([]byte{1}, keySize)}}})
	self, _ := g.self()
	recording := make(chan []byte, 1) // what a member says
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		defer close(recording)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		to, err := net.Dial("tcp", self.Addr.String())
		if err != nil {
			return
		}
		go io.Copy(c, to)
		var said bytes.Buffer
		io.Copy(io.MultiWriter(&said, to), c)
		to.Close()
		recording <- said.Bytes()
	}()
	other, _ := startTestGossip(t, "green", gossipConfig{sealer: sealer{keys: g.cfg.keys}})
	if n, err := joined(other, ln.Addr().String()); n != 1 {
		t.Fatal(err)
	}
	recorded := <-recording
	if len(recorded) <= helloSize {
		t.Fatalf("%d bytes were recorded", len(recorded))
	}
	for range 3 {
		c, err := net.Dial("tcp", self.Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		c.Write(recorded)
		c.SetDeadline(time.Now().Add(8 * time.Second))
		if got, _ := io.ReadAll(c); len(got) > helloSize+4 {
			t.Errorf("a recording of %d bytes is answered with %d bytes", len(recorded), len(got))
		}
		c.Close()
	}
}

// Where there is no key, a stranger says hello as a member does, and then sends
// tables as fast as they are taken.
func TestTablesThatPourInFillNoMemoryAndDelayNoAnswer(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	before := heapInUse()
	var frames atomic.Int64
	quit := make(chan struct{})
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			for pour(g, &frames, quit) {
			}
		})
	}
	worst := time.Duration(0)
	for frames.Load() < 1000 {
		start := time.Now()
		g.run(func(*node) error { return nil })
		worst = max(worst, time.Since(start))
		time.Sleep(ms)
	}
	grown := heapInUse() - before
	close(quit)
	all.Wait()
	t.Logf("%d frames; the loop answered within %v; %d MB more", frames.Load(), worst, grown>>20)
	if worst > 2*time.Second || grown > 64<<20 {
		t.Errorf("worst %v, %d MB", worst, grown>>20)
	}
}

func heapInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// pour sends pieces of a table until the agent has enough of it.
func pour(g *gossip, frames *atomic.Int64, quit chan struct{}) bool {
	self, _ := g.self()
	c, err := net.DialTimeout("tcp", self.Addr.String(), time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(8 * time.Second))
	s := (&sealer{portKind: gossipPort}).handshake(&session{conn: c, dialled: true})
	s.send(&header{Kind: msgSync, From: "x", Digest: 1})
	s.receive(&header{})
	for i := 0; s.err == nil; i++ {
		var us []update
		for k := range 300 {
			us = append(us, update{Member: Member{Name: fmt.Sprintf("y%d-%d", i, k), Addr: rigAddr(1), Incarnation: 9, Instance: 9, Status: statusLeft}})
		}
		s.send(&header{Kind: msgTable, From: "x", More: true, Target: fmt.Sprintf("z%06d", i)}, us...)
		frames.Add(1)
		select {
		case <-quit:
			return false
		default:
		}
	}
	return true
}

func TestAcceptorKeepsNoTraceOfConnections(t *testing.T) {
	g, _ := startTestGossip(t, "red", gossipConfig{})
	self, _ := g.self()
	before := runtime.NumGoroutine()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		c, err := net.Dial("tcp", self.Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		junk := make([]byte, rng.IntN(200))
		for k := range junk {
			junk[k] = byte(rng.Uint32())
		}
		c.Write(append([]byte(helloLine[:rng.IntN(len(helloLine)+1)]), junk...))
		if i%3 == 0 {
			c.(*net.TCPConn).SetLinger(0)
		}
		c.Close()
	}
	eventually(t, fmt.Sprintf("%d goroutines, as before", before), func() bool { return runtime.NumGoroutine() <= before })
}
