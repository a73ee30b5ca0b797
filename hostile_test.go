// hostile_test.go: a node among hostile peers, in virtual time. What strangers
// and bad bytes can do to real agents is in attack_test.go.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// rig plays the whole world around one node. What the peers do is read from
// in; after each step the node must still be what a member has to be.
type rig struct {
	t    *testing.T
	in   []byte
	n    *node
	c    *codec
	now  time.Duration
	over bool // it left, or found its name taken

	sealed  [][]byte // datagrams and frames that went either way, to be replayed
	frames  [][]byte
	seqs    []uint32 // of questions that the node has asked
	conns   []*rigConn
	lastIn  connID
	mode    [rigPeers]peerMode
	beatAt  time.Duration
	resolve bool // the node waits for its seeds' addresses
	joins   int  // attempts that wait for their end
	todo    []func()

	may       map[netip.AddrPort]bool // members, seeds, addresses of joins and namesakes
	got, sent map[netip.AddrPort]int  // bytes from and to all others
	incs      map[*entry]uint64
	told      map[string]EventKind
}

// peerMode is how a peer answers of its own accord.
type peerMode byte

const (
	peerAbsent peerMode = iota
	peerAnswers
	peerRefuses
	peerSilent // its kernel accepts
)

type rigConn struct {
	id    connID
	to    netip.AddrPort
	by    time.Duration // a dial without a result ends then; 0: it stands
	nonce uint64        // the node's challenge
}

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
	r := &rig{t: t, in: in, c: newCodec(), may: make(map[netip.AddrPort]bool), incs: make(map[*entry]uint64),
		got: make(map[netip.AddrPort]int), sent: make(map[netip.AddrPort]int), told: make(map[string]EventKind)}
	self := Member{Name: "n", Addr: rigAddr(0), Incarnation: 1000, Born: 1000}
	setup := r.byte()
	if setup&1 > 0 {
		self.Name, self.Tags = strings.Repeat("n", maxName), Tags("k="+strings.Repeat("v", maxTags-2))
		self.Incarnation, self.Born = 1<<41+1<<20, 1<<41
	}
	cfg := nodeConfig{Self: self, ReapAfter: 20 * time.Second, Codec: newCodec()}
	if setup&2 > 0 {
		cfg.Seeds = []string{"seed"}
	}
	cfg.Random[0] = setup
	r.n = newNode(cfg, 0)
	r.note()
	for i := 1; i <= int(setup>>2%rigPeers); i++ {
		r.mode[i] = peerAnswers
		r.n.adopt(Member{Name: rigNames[i], Addr: rigAddr(i), Incarnation: 1005, Born: 1000, Status: StatusAlive}, &update{})
		r.n.everJoined = true
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

// source is whom a datagram seems to come from: a peer or anybody else.
func (r *rig) source(name string) netip.AddrPort {
	if k := r.pick(4); k > 0 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(k)}), 9)
	} else if e := r.n.t.get(name); e != nil {
		return e.Addr
	}
	return rigAddr(1)
}

// incarnation is near what the node believes of name, or far from it.
func (r *rig) incarnation(name string) (inc, raised uint64) {
	inc, born := uint64(1000), uint64(1000)
	if e := r.n.t.get(name); e != nil {
		inc, born = e.Incarnation, e.Born
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

func (r *rig) head() head {
	h := head{Kind: kind(r.byte() % 15), From: r.name(), Promise: uint32(r.byte()) * 20}
	h.Incarnation, h.Raised = r.incarnation(h.From)
	sel := r.byte()
	if h.Target = r.name(); sel&1 > 0 {
		h.Target = r.n.self.Name
	}
	if h.Seq = uint32(sel); sel&2 > 0 && len(r.seqs) > 0 {
		h.Seq = r.seqs[len(r.seqs)-1-int(sel>>2)%len(r.seqs)]
	}
	if h.Verdict = verdict(r.byte() % 6); sel&4 > 0 {
		h.Digest = r.n.digest()
	} else if sel&8 > 0 {
		h.Digest = uint64(sel)
	}
	h.Nonce, h.More = uint64(sel>>4), sel&16 > 0
	return h
}

func (r *rig) update() update {
	sel := r.byte()
	u := update{Name: r.name(), By: r.name(), Status: Status(r.byte() % 8)}
	u.Incarnation, u.Raised = r.incarnation(u.Name)
	addr := rigAddr(1 + slices.Index(rigNames[1:], u.Name))
	if e := r.n.t.get(u.Name); e != nil {
		addr = e.Addr
	}
	switch sel % 8 {
	case 0:
		addr = rigAddr(r.pick(rigPeers))
	case 1:
		addr = netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1%eth0"), uint16(sel))
	}
	b, _ := addr.MarshalBinary()
	u.Addr = string(b)
	switch {
	case sel&8 > 0:
		u.Tags = strings.Repeat("t", []int{1, maxTags, maxTags + 1, 900}[sel>>4%4])
	case sel&16 > 0:
		u.Event, u.Payload, u.LTime = strings.Repeat("e", 1+int(sel>>6)*255), make([]byte, 4*r.pick(256)), uint64(r.byte())
		if u.Coalesce = sel&32 > 0; u.Coalesce {
			u.LTime = 1 << (u.LTime % 64)
		}
	case sel&32 > 0:
		u.Age = 1 << (r.byte() % 32)
	case sel&64 > 0:
		u.By = strings.Repeat("y", 5*int(r.byte()))
	}
	return u
}

// message is a head and some updates, sometimes with damage.
func (r *rig) message(h head) []byte {
	b := r.c.head(nil, &h)
	how := r.byte()
	for range how % 4 {
		u := r.update()
		b = r.c.update(b, &u)
	}
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
		h := r.head()
		r.datagram(r.source(h.From), r.message(h))
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
	case 3, 4:
		h := r.head()
		if op == 4 {
			h.Kind = []kind{kLook, kWatch, kExchange}[h.Kind%3]
		}
		if len(r.conns) < 64 {
			r.lastIn--
			r.conns = append(r.conns, &rigConn{id: r.lastIn})
			r.frame(r.conns[len(r.conns)-1], r.message(h))
		}
	case 5, 6, 7:
		if len(r.conns) > 0 {
			c := r.conns[r.pick(len(r.conns))]
			h := r.head()
			if h.Echo = c.nonce; h.Verdict == 5 {
				h.Echo++
			}
			r.frame(c, r.message(h))
		}
	case 8:
		if len(r.conns) > 0 && len(r.frames) > 0 {
			r.frame(r.conns[r.pick(len(r.conns))], r.frames[r.pick(len(r.frames))])
		}
	case 9:
		if len(r.conns) > 0 {
			c, errs := r.conns[r.pick(len(r.conns))], []error{nil, errRefused, errors.New("timeout")}
			if c.by > 0 {
				r.dialed(c, errs[r.pick(3)])
			} else {
				r.close(c)
			}
		}
	case 10:
		r.mode[1+r.pick(rigPeers-1)] = peerMode(r.byte() % 4)
	case 11:
		var addrs []netip.AddrPort
		for range r.pick(4) {
			addrs = append(addrs, rigAddr(r.pick(rigPeers)))
			r.may[addrs[len(addrs)-1]] = true
		}
		if r.resolve {
			r.resolve = false
			r.n.seedsResolved(r.now, addrs, nil)
		} else if r.joins < 8 {
			r.joins++
			r.n.join(r.now, 1, addrs, nil)
		}
	case 12:
		size, how := r.pick(256), r.byte()
		for i := range 1 + int(how>>2) {
			r.n.userEvent(r.now, "deploy"+strconv.Itoa(i%int(1+how&2)), make([]byte, 6*size), how&1 > 0)
		}
	case 13:
		r.n.forceLeave(r.now, r.name(), r.byte()&1 > 0)
	case 14: // a crowd, or checks of all of it
		from, much := r.byte(), r.byte()
		source := r.source("a")
		for i := range 40 {
			if m := fmt.Sprintf("m%03d", from+byte(i)); much&1 == 0 {
				b, _ := rigAddr(300 + int(from) + i).MarshalBinary()
				u := update{Name: m, Addr: string(b), Incarnation: 1000, Status: StatusAlive}
				r.datagram(rigAddr(1), r.c.update(r.c.head(nil, &head{Kind: kFlood, From: "a", Incarnation: 1000}), &u))
			} else {
				h := head{Kind: kCheck, From: "a", Incarnation: 1000, Target: m, Seq: uint32(i) + uint32(much)<<8}
				if much&2 > 0 {
					h.Target = fmt.Sprintf("m%03d", from)
				}
				r.datagram(source, r.c.head(nil, &h))
			}
		}
	case 15:
		if r.byte()%8 == 0 {
			r.n.startLeave(r.now)
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

func (r *rig) datagram(from netip.AddrPort, b []byte) {
	if len(b) > maxDatagram-sealSize {
		return
	}
	r.sealed = append(r.sealed[max(0, len(r.sealed)-200):], b)
	r.got[from] += len(b)
	r.n.datagram(r.now, from, b)
	r.note()
}

func (r *rig) frame(c *rigConn, b []byte) {
	if c.by > 0 { // what is said before the dial has a result
		return
	}
	r.frames = append(r.frames[max(0, len(r.frames)-200):], b)
	if err := r.n.frame(r.now, c.id, b); err != nil {
		r.close(c)
	}
	r.note()
}

func (r *rig) dialed(c *rigConn, err error) {
	if c.by = 0; err != nil {
		r.forget(c.id)
	}
	r.n.dialed(r.now, c.id, err)
	r.note()
}

func (r *rig) close(c *rigConn) {
	if r.forget(c.id) {
		r.n.closed(r.now, c.id, errors.New("closed"))
		r.note()
	}
}

func (r *rig) forget(id connID) bool {
	had := len(r.conns)
	r.conns = slices.DeleteFunc(r.conns, func(c *rigConn) bool { return c.id == id })
	return len(r.conns) < had
}

// note remembers whom the node may speak to: those it was told are members,
// and where a namesake is said to live.
func (r *rig) note() {
	for _, e := range r.n.t.ordered {
		r.may[e.Addr] = true
	}
	if r.n.rival != nil {
		r.may[r.n.rival.m.Addr] = true
	}
}

// settle ticks until the node wants to sleep and nobody answers any more.
func (r *rig) settle() time.Duration {
	for ticks := 0; ; ticks++ {
		r.n.tick(r.now)
		o := r.n.take()
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
					h := r.self(i, kHeartbeat)
					h.Seq, h.Promise, h.Digest = uint32(r.now/ms), 600, r.n.digest()
					r.datagram(rigAddr(i), r.c.head(nil, &h))
				}
			}
		}
		for _, c := range slices.Clone(r.conns) {
			if c.by > 0 && r.now >= c.by {
				r.dialed(c, errors.New("timeout"))
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

// self is a head as peer i would write it.
func (r *rig) self(i int, k kind) head {
	h := head{Kind: k, From: rigNames[i], Incarnation: 1000}
	if e := r.n.t.get(h.From); e != nil && !e.Status.dead() {
		h.Incarnation, h.Raised = e.Incarnation, e.Incarnation-e.Born
	}
	return h
}

// react carries outputs out, and lets peers answer that do.
func (r *rig) react(o outputs) {
	r.resolve = r.resolve || o.resolve
	r.joins -= len(slices.DeleteFunc(o.joins, func(j joined) bool { return j.token == 0 }))
	for _, p := range o.packets {
		r.sealed = append(r.sealed[max(0, len(r.sealed)-200):], p.data)
		h, _, _ := r.c.readHead(p.data)
		if h.Kind == kPing || h.Kind == kCheck || h.Kind == kFlood && h.Seq > 0 {
			r.seqs = append(r.seqs[max(0, len(r.seqs)-32):], h.Seq)
			if i := rigPeer(p.to); r.mode[i] == peerAnswers {
				a := r.self(i, map[kind]kind{kPing: kAck, kFlood: kAck, kCheck: kVote}[h.Kind])
				a.Seq, a.Target, a.Verdict = h.Seq, h.Target, vAlive
				r.todo = append(r.todo, func() { r.datagram(rigAddr(i), r.c.head(nil, &a)) })
			}
		}
	}
	for _, op := range o.streams {
		r.stream(op)
	}
}

func (r *rig) stream(op streamOp) {
	i := slices.IndexFunc(r.conns, func(c *rigConn) bool { return c.id == op.id })
	switch op.op {
	case opDial:
		c := &rigConn{id: op.id, to: op.to, by: r.now + streamFor}
		r.conns = append(r.conns, c)
		switch r.mode[rigPeer(op.to)] {
		case peerAnswers, peerSilent:
			r.todo = append(r.todo, func() { r.dialed(c, nil) })
		case peerRefuses:
			r.todo = append(r.todo, func() { r.dialed(c, errRefused) })
		}
	case opClose:
		r.forget(op.id)
	case opSend:
		r.frames = append(r.frames[max(0, len(r.frames)-200):], op.data)
		if h, _, err := r.c.readHead(op.data); err != nil {
			r.t.Fatal(err)
		} else if i >= 0 && h.Nonce != 0 {
			c := r.conns[i]
			c.nonce = h.Nonce
			if p := rigPeer(c.to); c.id > 0 && r.mode[p] == peerAnswers {
				w := r.self(p, kWelcome)
				w.Nonce, w.Echo, w.Digest = 99, h.Nonce, r.n.digest()
				r.todo = append(r.todo, func() { r.frame(c, r.c.head(nil, &w)) })
			}
		}
	}
}

// ---- what must hold ----

// sealSize is what version, cluster tag, nonce and tag add to a datagram.
const sealSize = 1 + 4 + 12 + 16

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
		if r.sent[p.to] += len(p.data); !r.may[p.to] && r.sent[p.to] > r.got[p.to] {
			h, _, _ := r.c.readHead(p.data)
			r.t.Fatalf("%v got %d bytes for %d: %+v", p.to, r.sent[p.to], r.got[p.to], h)
		}
	}
	for _, op := range o.streams {
		if op.op == opDial && (!op.to.IsValid() || !r.may[op.to]) {
			r.t.Fatalf("it dials %v", op.to)
		}
		if len(op.data) > maxFrame {
			r.t.Fatalf("a frame of %d bytes", len(op.data))
		}
	}
	if o.wake < r.now {
		r.t.Fatalf("it wants to be woken in the past")
	}
	o.logs = slices.DeleteFunc(o.logs, func(l string) bool { return strings.HasPrefix(l, "[DEBUG]") || strings.HasPrefix(l, "[TRACE]") })
	if len(o.logs) > 20 {
		r.t.Fatalf("%d log lines: %q", len(o.logs), o.logs[0])
	}
	if o.fatal != nil && !strings.Contains(o.fatal.Error(), "taken") {
		r.t.Fatal(o.fatal)
	}
	r.over = o.fatal != nil || o.left
}

func (r *rig) checkTable() {
	n, tb := r.n, r.n.t
	if n.self != tb.get(n.self.Name) || n.self.Status != StatusAlive || n.self.lost || n.self.reaped {
		r.t.Fatalf("it thinks of itself as %+v", n.self)
	}
	if len(tb.ordered) != len(tb.byName) {
		r.t.Fatalf("%d entries and %d names", len(tb.ordered), len(tb.byName))
	}
	digest, alive := uint64(0), 0
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
		if !e.reaped {
			digest ^= e.digest()
		}
		if !e.Status.dead() {
			alive++
		}
	}
	if tb.digest != digest {
		r.t.Fatalf("the digest is not that of the table")
	}
	for i := range tb.ring {
		if len(tb.ring[i]) != alive || !slices.IsSortedFunc(tb.ring[i], func(a, b *entry) int { return cmp.Compare(a.pos[i], b.pos[i]) }) {
			r.t.Fatalf("ring %d has %d of %d members, or in bad order", i, len(tb.ring[i]), alive)
		}
	}
}

func (r *rig) checkBounds() {
	n, members := r.n, len(r.n.t.ordered)
	bound := func(what string, is, limit int) {
		if is > limit {
			r.t.Fatalf("%d %s, the limit is %d", is, what, limit)
		}
	}
	bound("members", members, maxMembers)
	bound("probes", len(n.probes), maxProbes+len(n.preds))
	bound("suspicions", len(n.accused), members)
	bound("floods", len(n.queue), maxQueue)
	bound("events", len(n.recent), maxEvents)
	bound("peers", len(n.peers), members+300) // until the next reaping
	bound("attempts", len(n.attempts), 9)
	bound("seeds' names", len(n.seeds.names), 64+4)
	bound("streams", len(n.streams), 64+3*len(n.probes)+4*len(n.attempts)+members+16)
	for _, ev := range n.recent {
		bound("bytes of an event", len(ev.data), maxEvent+maxName+40)
	}
	for _, f := range n.queue {
		bound("bytes of a flood", len(f.data), maxEvent+maxName+40)
	}
	for _, p := range n.probes {
		bound("askers", len(p.askers), 64)
		bound("votes", len(p.votes), members+300)
	}
	for _, s := range n.streams {
		bound("claims of a stream", len(s.theirs)+len(s.events), maxMembers+maxEvents+2)
	}
	if n.rival != nil {
		bound("joins to be made anew", len(n.rival.again), 64)
	}
	for _, a := range n.attempts {
		open := 0
		for _, s := range n.streams {
			if s.attempt == a {
				open++
			}
		}
		if n.rival != nil {
			for _, s := range n.rival.again {
				if s.attempt == a {
					open++
				}
			}
		}
		if open != a.open {
			r.t.Fatalf("a join waits for %d streams and there are %d", a.open, open)
		}
	}
}

// checkEvent: per member, events alternate.
func (r *rig) checkEvent(ev Event) {
	name, was := ev.Member.Name, r.told[ev.Member.Name]
	alive := was == EventJoin
	ok := true
	switch ev.Kind {
	case EventUser:
		if len(ev.Name)+len(ev.Payload) > maxEvent {
			r.t.Fatalf("a user event of %d bytes", len(ev.Name)+len(ev.Payload))
		}
		return
	case EventJoin:
		ok = !alive
	case EventFailed:
		ok = alive
	case EventUpdate:
		ok = alive
		ev.Kind = EventJoin
	case EventLeave:
		ok = was != EventLeave
	case EventReap: // who was reaped may be heard of again as failed, without an event
		ok = !alive
	}
	if name == r.n.self.Name {
		ok = ok && ev.Kind == EventJoin
	}
	if !ok {
		r.t.Fatalf("%v of %s after %v", ev.Kind, name, was)
	}
	r.told[name] = ev.Kind
}

// FuzzNode: whatever peers say, repeat, garble and fail to answer, the node
// stays a member: alive to itself, one entry a name, no incarnation ever falls,
// memory, packets and wake-ups are bounded, nobody is answered with more than
// he sent, and when all is over it still answers.
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
	if r.joins > 0 || len(r.n.attempts) > 0 && !r.resolve {
		r.t.Fatalf("%d joins have not ended", r.joins)
	}
	if len(r.n.streams) > 3*len(r.n.probes)+2*r.n.t.alive()+4 {
		for _, s := range r.n.streams {
			r.t.Logf("%d %s of %q, open %v, until %v", s.id, kindWords[s.want], s.name, s.open, s.by)
		}
		r.t.Fatalf("%d streams are left, and it is %v", len(r.n.streams), r.n.now)
	}
	h := r.head()
	h.Kind, h.From, h.Target, h.Seq, h.Digest = kPing, rigNames[7], r.n.self.Name, 77, 1<<63
	r.n.datagram(r.now, rigAddr(7), r.c.head(nil, &h))
	r.n.tick(r.now)
	for _, p := range r.n.take().packets {
		if a, _, _ := r.c.readHead(p.data); a.Kind == kAck && a.Seq == 77 && p.to == rigAddr(7) {
			return
		}
	}
	r.t.Fatal("a ping is not answered")
}

// crowd tells the node of count more members, m000 and so on.
func (r *rig) crowd(count int) {
	for i := range count {
		b, _ := rigAddr(300 + i).MarshalBinary()
		u := update{Name: fmt.Sprintf("m%03d", i), Addr: string(b), Incarnation: 1000, Status: StatusAlive}
		r.datagram(rigAddr(1), r.c.update(r.c.head(nil, &head{Kind: kFlood, From: "a", Incarnation: 1000}), &u))
	}
	r.settle()
}

func TestChecksOfEverybodyNeitherKeepTheNodeBusyNorFromItsOwnProbes(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	r.crowd(2 * maxProbes)
	for i := range 2 * maxProbes {
		h := head{Kind: kCheck, From: "a", Incarnation: 1000, Target: fmt.Sprintf("m%03d", i), Seq: uint32(i)}
		r.datagram(rigAddr(1), r.c.head(nil, &h))
	}
	for i := range 100 { // of the same member
		h := head{Kind: kCheck, From: "a", Incarnation: 1000, Target: "m000", Seq: uint32(1000 + i)}
		r.datagram(rigAddr(1), r.c.head(nil, &h))
	}
	r.mode = [rigPeers]peerMode{} // nobody answers any more
	for _, p := range r.n.preds {
		p.due = r.n.now
	}
	if r.settle(); len(r.n.preds) == 0 {
		t.Fatal("the node watches nobody")
	}
	for _, p := range r.n.preds {
		if r.n.probeOf(p.e) == nil {
			t.Errorf("%s is overdue and not probed", p.e.Name)
		}
	}
	r.pass(2 * time.Second) // counts the wake-ups
}

func TestMoreNewsThanCanBeSentIsNotKept(t *testing.T) {
	r := newRig(t, []byte{7 << 2})
	for i := range 2 * maxQueue {
		r.n.flood(strconv.Itoa(i), []byte("news"))
	}
	r.checkBounds()
}

func TestATableThatNeverEndsIsCutOff(t *testing.T) {
	r := newRig(t, nil)
	r.n.join(r.now, 1, []netip.AddrPort{rigAddr(1)}, nil)
	s := r.n.streams[0]
	r.n.dialed(r.now, s.id, nil)
	w := head{Kind: kWelcome, From: "a", Incarnation: 1000, Nonce: 9, Echo: s.nonce, Digest: 1}
	if err := r.n.frame(r.now, s.id, r.c.head(nil, &w)); err != nil {
		t.Fatal(err)
	}
	w.Kind, w.More = kTable, true
	addr, _ := rigAddr(2).MarshalBinary()
	for i := range maxMembers + maxEvents + 10 {
		u := update{Name: fmt.Sprint("m", i), Addr: string(addr), Incarnation: 1000, Status: StatusPruned}
		if err := r.n.frame(r.now, s.id, r.c.update(r.c.head(nil, &w), &u)); err != nil {
			return
		}
	}
	t.Error("one stream may tell of any number of members")
}

// exchange opens a stream, as a peer that dials the node, and returns the
// node's challenge.
func (r *rig) exchange(from string) *rigConn {
	r.lastIn--
	c := &rigConn{id: r.lastIn}
	r.conns = append(r.conns, c)
	r.frame(c, r.c.head(nil, &head{Kind: kExchange, From: from, Incarnation: 1000, Nonce: 9, Digest: 1}))
	r.settle()
	return c
}

func TestAStreamThatDoesNotAnswerTheChallengeTellsNothing(t *testing.T) {
	r := newRig(t, []byte{1 << 2})
	c := r.exchange("a")
	addr, _ := rigAddr(2).MarshalBinary()
	u := update{Name: "b", Addr: string(addr), Incarnation: 1000, Status: StatusAlive}
	for _, echo := range []uint64{0, c.nonce + 1} {
		if err := r.n.frame(r.now, c.id, r.c.update(r.c.head(nil, &head{Kind: kTable, From: "a", Echo: echo}), &u)); err == nil || r.n.t.get("b") != nil {
			t.Errorf("what a stream says with echo %d to %d is believed", echo, c.nonce)
		}
	}
}

func TestAStrangersTableThatTellsOfANamesakeMakesTheNodeJoinNobody(t *testing.T) {
	r := newRig(t, nil)
	c := r.exchange("a")
	addr, _ := rigAddr(2).MarshalBinary()
	u := update{Name: "n", Addr: string(addr), Incarnation: 900, Status: StatusAlive}
	r.frame(c, r.c.update(r.c.head(nil, &head{Kind: kTable, From: "a", Echo: c.nonce}), &u))
	r.pass(time.Second) // looks at each dial
	if len(r.n.streams) > 0 {
		t.Errorf("streams are left: %+v", r.n.streams[0])
	}
}

func TestAPeerThatSaysGoodbyeEndsTheJoin(t *testing.T) {
	r := newRig(t, nil)
	r.may[rigAddr(1)] = true
	r.n.join(r.now, 1, []netip.AddrPort{rigAddr(1)}, nil)
	r.settle()
	r.dialed(r.conns[0], nil)
	r.settle()
	r.frame(r.conns[0], r.c.head(nil, &head{Kind: kBye, From: "a", Incarnation: 1000, Echo: r.conns[0].nonce}))
	r.n.tick(r.now)
	if o := r.n.take(); len(o.joins) != 1 || o.joins[0].ok != 0 || len(o.joins[0].errs) != 1 {
		t.Errorf("the join ended as %+v", o.joins)
	}
}

func TestWhatIsAddedToAClaimOrAnEventGoesNoFurther(t *testing.T) {
	r := newRig(t, []byte{2 << 2})
	addr, _ := rigAddr(3).MarshalBinary()
	for _, u := range []update{
		{Name: "c", Addr: string(addr), Incarnation: 9, Status: StatusAlive, By: strings.Repeat("y", 1200)},
		{Name: "a", Event: "deploy", LTime: 1, Addr: strings.Repeat("a", 400), Tags: strings.Repeat("t", 400), By: strings.Repeat("y", 400)},
	} {
		r.datagram(rigAddr(1), r.c.update(r.c.head(nil, &head{Kind: kFlood, From: "a", Incarnation: 1005}), &u))
	}
	had := len(r.sealed)
	r.pass(20 * ms)
	for _, b := range r.sealed[had:] {
		if len(b) > 200 {
			t.Errorf("%d bytes are sent", len(b))
		}
	}
	if r.n.t.get("c") != nil {
		t.Error("a claim by somebody of 1,200 bytes is believed")
	}
}

func TestTheDigestIsRightWhenAMemberComesBackThatWasForgotten(t *testing.T) {
	r := newRig(t, []byte{1 << 2})
	m := r.n.t.get("a").Member
	m.Status = StatusFailed
	r.n.adopt(m, &update{})
	r.pass(r.n.ReapAfter + 3*time.Second)
	if !r.n.t.get("a").reaped {
		t.Fatal("a is not forgotten yet")
	}
	m.Status, m.Incarnation = StatusAlive, m.Incarnation+1
	r.n.adopt(m, &update{})
	r.settle() // compares
}

func TestTablesForManyAtOnceAreBounded(t *testing.T) {
	r := newRig(t, nil)
	addr, _ := rigAddr(2).MarshalBinary()
	for i := range 1500 {
		u := update{Name: fmt.Sprint("m", i), Addr: string(addr), Incarnation: 1000, Status: StatusFailed, Tags: strings.Repeat("t", maxTags)}
		r.n.learn(&u, "a")
	}
	r.settle()
	h := head{Kind: kExchange, From: "a", Incarnation: 1000, Nonce: 1, Digest: 1}
	served, refused := 0, 0
	for id := range connID(maxInbound) {
		if err := r.n.frame(r.now, -1-id, r.c.head(nil, &h)); err != nil {
			refused++
		} else {
			served++
		}
	}
	bytes := 0
	for _, op := range r.n.take().streams {
		bytes += len(op.data)
	}
	if t.Logf("%d peers get %d bytes, %d shall ask again", served, bytes, refused); bytes > 12<<20 || served == 0 {
		t.Errorf("%d bytes for %d peers", bytes, served)
	}
}

func TestARecordedAnswerDoesNotReviveWhoeverFailedForMe(t *testing.T) {
	r := newRig(t, []byte{5 << 2})
	a := r.n.t.get("a")
	for range 3 {
		r.n.ping(a)
		r.pass(time.Second)
	}
	recorded := slices.Clone(r.sealed)
	r.mode = [rigPeers]peerMode{}
	r.pass(8 * time.Second)
	if a.visible() != StatusFailed || !a.lost {
		t.Fatalf("a is %v", a.visible())
	}
	for _, b := range recorded {
		r.datagram(a.Addr, b)
		r.settle()
		if a.visible() != StatusFailed {
			h, _, _ := r.c.readHead(b)
			t.Fatalf("revived by %+v", h)
		}
	}
}
