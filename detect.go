// detect.go: who has died, who only stalls, and whether it is me.
//
// The failure detector is a part of the node (gossip.go): the awake clock, the ring on which heartbeats are
// promised and missed, probes and the votes of helpers, the verdicts that follow, suspicion and its end,
// isolation, and retry. Evidence starts a probe; only what probes see leads to a verdict. How anything travels
// is not known here.

package main

import (
	"cmp"
	"slices"
	"time"
)

// The detector's times and bounds; a probe counts from its start.
const (
	beatEvery    = 500 * ms // one heartbeat, to one watcher at a time
	overdueAfter = 100 * ms // past its promise
	newGrace     = 500 * ms
	linkCount    = 2        // watchers that hold a watch link
	linkAfter    = 100 * ms // while many join, rings change all the time
	missedEvery  = 100 * ms

	askAfter    = 100 * ms // a second ping, and helpers
	askOnce     = 300 * ms // more: those that have not voted
	helpFor     = 350 * ms // a helper's vote
	probeFor    = 600 * ms // the end of a round
	voteAge     = 3 * time.Second
	suspectFor  = 1500 * ms
	stallFor    = 10 * time.Second
	stallRound  = time.Second
	aloneAfter  = 3 * time.Second
	lastCallGap = 150 * ms
	lastCalls   = 6
	retryRate   = 2.0 // pings a second, times the failed share of the table
	maxProbes   = 256
)

// verdict is what one observer saw of a target, in rising weight as evidence that somebody is there.
type verdict uint8

const (
	vNone        verdict = iota
	vUnreachable         // nothing at all
	vRefused             // the host is there, the process is not
	vSilent              // the kernel accepts, the process does not answer
	vAlive
)

// ---- awake time, and rates ----

// clock is awake time, which all deadlines run on, beside the caller's.
type clock struct {
	real    time.Duration // the caller's, at the last entry
	now     time.Duration // awake
	planned time.Duration // for how long nothing falls due
}

// advance runs the awake clock. A process that was stopped would blame everybody else for its own silence, so
// a gap counts for no more than the planned wait and a little.
func (c *clock) advance(now time.Duration) {
	c.now += max(min(now-c.real, c.planned+lateBy), 0)
	c.real = now
}

// wakeAt asks to be woken at awake time t.
func (c *clock) wakeAt(t time.Duration) { c.planned = min(c.planned, max(t-c.now, 0)) }

// bucket bounds a rate; its tokens may fall below 0, and then it is empty.
type bucket struct {
	tokens float64
	at     time.Duration
}

// fill lets rate tokens a second run in, and burst of them lie.
func (b *bucket) fill(now time.Duration, rate, burst float64) *bucket {
	if b.at == 0 {
		b.tokens = burst
	}
	b.tokens, b.at = min(b.tokens+rate*(now-b.at).Seconds(), burst), now
	return b
}

// take takes a token, if there is one.
func (b *bucket) take() bool {
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// ---- the ring ----

// run is one run of a member. The entry may come to be about another one.
type run struct {
	e    *entry
	born uint64
}

func runOf(e *entry) run { return run{e, e.Born} }

// over reports whether the run is believed to have ended.
func (r run) over() bool { return r.e.Born != r.born || r.e.Status.dead() }

// ring is whom I watch, and who watches me.
type ring struct {
	seen     uint64   // version of the table that this follows
	watchers []*entry // in the order of the rings
	watched  []*entry
	nextBeat time.Duration
	linkAt   time.Duration // when to ask for other watch links; 0: they are as they shall be
	missedAt time.Duration // when I last asked for news that I had missed
}

// refresh recomputes whom I watch and who watches me after a change.
func (r *ring) refresh(n *node) {
	if r.seen == n.t.version {
		return
	}
	// After a mass failure the rings must heal at once, so whom I newly watch is due soon. After a join
	// nothing is broken, and everybody is busy.
	grace := newGrace
	if n.t.shrunk > r.seen {
		grace = overdueAfter
	}
	watchers, watched := r.watchers, r.watched
	r.seen, r.watchers, r.watched = n.t.version, n.t.watchers(n.self), n.t.watched(n.self)
	for _, e := range r.watched {
		if d := e.deal(); d.due == 0 || !slices.Contains(watched, e) {
			d.due = n.now + grace
		}
	}
	for _, e := range r.watchers {
		if !slices.Contains(watchers, e) {
			e.deal().promised = 0
		}
	}
	r.greet(n)
	r.linkAt = cmp.Or(r.linkAt, n.now+linkAfter)
}

// greet sends new watchers their first heartbeat. Each is promised the first beat that nobody else has been
// promised: were all told to wait for a whole cycle, nobody would notice before its end that a host vanished right
// after it had joined.
func (r *ring) greet(n *node) {
	for _, w := range r.watchers {
		if w.deal().promised != 0 {
			continue
		}
		next := max(r.nextBeat, n.now)
		taken := func(o *entry) bool { return (o.deal().promised - next).Abs() < beatEvery/2 }
		for slices.ContainsFunc(r.watchers, taken) {
			next += beatEvery
		}
		r.beat(n, w, next)
	}
}

// beat sends w a heartbeat that promises the next one. From whoever has not answered yet it wants an answer:
// before that it gets no floods, which it would not take, if it has not heard of this node.
func (r *ring) beat(n *node, w *entry, next time.Duration) {
	h := n.head(kHeartbeat)
	h.Promise = uint32((next - n.now) / ms)
	if w.deal().promised = next; w.deal().met {
		n.send(w.Member, h, nil)
	} else {
		n.post(w.Member, h, nil, next-n.now)
	}
}

// step sends the next heartbeat, to the watcher whose promise ends first, and starts a probe of everybody who
// is overdue.
func (r *ring) step(n *node) {
	if len(r.watchers) > 0 {
		if n.now >= r.nextBeat {
			w := slices.MinFunc(r.watchers, func(a, b *entry) int { return cmp.Compare(a.deal().promised, b.deal().promised) })
			r.beat(n, w, n.now+time.Duration(len(r.watchers))*beatEvery)
			r.nextBeat = max(r.nextBeat+beatEvery, n.now+beatEvery/2)
		}
		n.wakeAt(r.nextBeat)
	}
	for _, e := range r.watched {
		switch due := e.deal().due; {
		case n.detector.probeOf(e) != nil:
		case n.now >= due:
			n.detector.judge(n, e.Member, e)
		default:
			n.wakeAt(due)
		}
	}
	if r.linkAt != 0 && n.now >= r.linkAt {
		r.link(n)
	} else if r.linkAt != 0 {
		n.wakeAt(r.linkAt)
	}
}

// reached notes a sign of life of e that promises nothing: what it promised before holds, or a whole cycle may pass.
func (r *ring) reached(n *node, e *entry) {
	if d := e.deal(); d.due <= n.now {
		d.due = n.now + time.Duration(min(rings, n.t.alive()-1)+1)*beatEvery + overdueAfter
	}
}

// met is told that e has answered for the first time: a watcher can be linked to now.
func (r *ring) met(n *node, e *entry) {
	if slices.Contains(r.watchers, e) {
		r.linkAt = cmp.Or(r.linkAt, n.now+linkAfter)
	}
}

// missed is told of a heartbeat that does not count, since its sender is not remembered. But it has me for a
// watcher, so that I have missed its news. Where all who would pass such news on are as new, I would hear of none
// of them for a second: as nothing of theirs counts, they never meet me, and flood nothing to me. Repair's one
// comparison a second does not do: a hundred joiners then took up to 0.9 s, and 0.25 s with this.
func (r *ring) missed(n *node, e *entry, h head) {
	if h.Kind != kHeartbeat || e == n.self || e != nil && h.Incarnation <= e.Incarnation || n.now < r.missedAt+missedEvery {
		return
	}
	if o := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() && e.deal().met }); o != nil {
		r.missedAt = n.now
		n.exchange(o.Member)
	}
}

// link asks for a watch link to the first watchers that have answered.
func (r *ring) link(n *node) {
	n.out.links, r.linkAt = []Member{}, 0
	for _, w := range r.watchers {
		if len(n.out.links) < linkCount && w.deal().met {
			n.out.links = append(n.out.links, w.Member)
		}
	}
}

// ---- probes ----

// detector is all probes that run, and whether this node hears anybody.
type detector struct {
	probes    []*probe
	heard     time.Duration // last sign of anybody
	calls     int           // last-call rounds made
	callAt    time.Duration
	alone     bool
	retry     bucket
	strangers bucket // what those get who have never answered
}

// probe is one look at a member: for a verdict of mine, of which a target has one at a time, or for somebody who
// asked.
type probe struct {
	m      Member // whom, as it was believed
	e      *entry // nil: a namesake of mine, whom no entry describes
	asker  *entry // who wants a vote of mine, in the probe check; nil: nobody
	check  uint32
	start  time.Duration // of the round
	last   bool          // the target is suspect, and this round decides
	seq    uint32        // of the checks of this probe
	pings  int           // of this round, as are the checks
	checks int
	mine   verdict
	udp    bool // it answered by UDP
	ended  bool // a watch link ended: TCP did work, so a refusal means that nobody is there
	votes  []vote
	asked  []*entry
}

type vote struct {
	by   string
	v    verdict
	when time.Duration
}

// find returns the probe for which is holds, or nil.
func (d *detector) find(is func(*probe) bool) *probe {
	if i := slices.IndexFunc(d.probes, is); i >= 0 {
		return d.probes[i]
	}
	return nil
}

// of is all probes of one run of a member.
func (d *detector) of(m Member) (ps []*probe) {
	for _, p := range d.probes {
		if p.m.Name == m.Name && p.m.Born == m.Born {
			ps = append(ps, p)
		}
	}
	return ps
}

// probeOf is the probe of e, or (nil) of a namesake, for a verdict of mine.
func (d *detector) probeOf(e *entry) *probe {
	return d.find(func(p *probe) bool { return p.e == e && p.asker == nil })
}

func (d *detector) begin(n *node, m Member, e *entry) *probe {
	n.logf("[TRACE] probing %s at %s", m.Name, m.Addr)
	p := &probe{m: m, e: e, start: n.now, seq: n.nonce()}
	d.probes = append(d.probes, p)
	n.wakeAt(n.now)
	return p
}

// judge probes m, which e describes (nil: a namesake), for a verdict of mine. Where there are too many probes it
// has to wait: nil.
func (d *detector) judge(n *node, m Member, e *entry) *probe {
	if p := d.probeOf(e); p != nil {
		return p
	}
	if e == n.self || m.Status.dead() || len(d.probes) >= maxProbes {
		n.wakeAt(n.now + askAfter)
		return nil
	}
	return d.begin(n, m, e)
}

// linkEnded is told that a watch link with a run of m has ended (tries 0), or for the how manieth time in a
// row that none could be had. It is evidence that starts a probe, never a verdict.
func (n *node) linkEnded(m Member, tries int, refused bool) {
	e := n.t.get(m.Name)
	if e == nil || e.Born != m.Born || e.lost || n.own.leaving != 0 {
		return
	}
	if tries == 4 {
		n.logf("[WARN] no TCP connection to %s at %s lasts: is TCP blocked between it and %s?", m.Name, m.Addr, n.self.Addr)
	}
	if p := n.detector.judge(n, e.Member, e); p != nil {
		p.ended = p.ended || tries == 0
		if refused {
			n.detector.observed(n, p, vRefused)
		}
	}
}

func (d *detector) step(n *node) {
	for _, p := range slices.Clone(d.probes) {
		d.stepProbe(n, p)
	}
	d.stepAlone(n)
	d.stepRetry(n)
}

// stepProbe does what is due in a probe.
func (d *detector) stepProbe(n *node, p *probe) {
	if p.e != nil && (p.e.Born != p.m.Born || p.e.Status.dead()) ||
		p.last && (p.e.Status != statusSuspect || p.e.Incarnation != p.m.Incarnation) { // it has refuted
		d.end(p)
		return
	}
	age, end := n.now-p.start, probeFor
	if p.asker != nil {
		end = helpFor
	}
	again := age >= askAfter || p.mine == vRefused
	if p.pings == 0 && age >= 0 {
		n.look(p.m)
	}
	if p.pings == 0 && age >= 0 || p.pings == 1 && again {
		p.pings++
		n.ping(p.m)
	}
	if p.e != nil && p.asker == nil && (p.checks == 0 && again || p.checks == 1 && age >= askOnce) {
		p.checks++
		d.check(n, p)
	}
	if age >= end {
		d.conclude(n, p)
		return
	}
	for _, at := range []time.Duration{0, askAfter, askOnce, end} {
		if age < at {
			n.wakeAt(p.start + at)
		}
	}
}

// check asks the target's other watchers and one random member to look, and again those that have not voted.
func (d *detector) check(n *node, p *probe) {
	if p.checks == 1 {
		p.asked = slices.DeleteFunc(n.t.watchers(p.e), func(w *entry) bool { return w == n.self })
		if r := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() && e != p.e && !slices.Contains(p.asked, e) }); r != nil {
			p.asked = append(p.asked, r)
		}
	}
	h := n.head(kCheck)
	h.Seq, h.Target = p.seq, p.m.Name
	for _, w := range p.asked {
		if !slices.ContainsFunc(p.votes, func(v vote) bool { return v.by == w.Name && v.when >= p.start }) {
			n.send(w.Member, h, nil)
		}
	}
}

// anyOther picks one of the other members among list for which ok holds, or nil.
func (n *node) anyOther(list []*entry, ok func(*entry) bool) *entry {
	if len(list) == 0 {
		return nil
	}
	at := n.rng.IntN(len(list))
	for i := range list {
		if e := list[(at+i)%len(list)]; e != n.self && !e.reaped && ok(e) {
			return e
		}
	}
	return nil
}

// asked answers the check of by, at once where the answer is known and within helpFor else. Only members are
// looked at, at the address that I know.
func (d *detector) asked(n *node, by *entry, h head) {
	e := n.t.get(h.Target)
	again := func(p *probe) bool { return p.asker == by && p.check == h.Seq }
	switch {
	case e == nil || e == n.self || by.Status.dead() || d.find(again) != nil:
	case e.Status.dead(): // the asker has missed it, and may have nobody else to ask
		d.vote(n, &probe{m: e.Member, asker: by, check: h.Seq})
	case len(d.probes) < maxProbes/2: // I have my own to look at
		running := d.of(e.Member)
		p := d.begin(n, e.Member, e)
		p.asker, p.check = by, h.Seq
		if len(running) > 0 { // one look will do for all
			p.pings = 2
			d.observed(n, p, running[0].mine)
		}
	}
}

// vote tells the asker what was seen, and of which run: a helper that knows a newer one would else acquit the old
// one for ever.
func (d *detector) vote(n *node, p *probe) {
	h := n.head(kVote)
	h.Seq, h.Target, h.Verdict = p.check, p.m.Name, max(p.mine, vUnreachable)
	n.send(p.asker.Member, h, wire.encode(nil, &update{Member: p.m}))
}

// voted takes a helper's answer, if it is one to a probe that still runs. One about another run is news of that.
func (d *detector) voted(n *node, by *entry, h head, us []update) {
	p := d.find(func(p *probe) bool { return p.seq == h.Seq && p.m.Name == h.Target })
	switch {
	case p == nil || len(us) != 1 || us[0].Member.Name != h.Target || by == p.e || by.Status.dead():
	case us[0].Member.Born == p.m.Born:
		d.count(n, p, by.Name, min(h.Verdict, vAlive))
	case !us[0].Member.Status.dead():
		n.learn(&us[0], by.Name, nil)
	}
}

// count counts v, by whom; nothing if there is no probe.
func (d *detector) count(n *node, p *probe, by string, v verdict) {
	if p != nil {
		p.votes = append(slices.DeleteFunc(p.votes, func(o vote) bool { return o.by == by }), vote{by, v, n.now})
		d.refused(n, p)
	}
}

// seen counts the observers whose verdict lies between lo and hi, me included.
func (p *probe) seen(lo, hi verdict) (c int) {
	for _, v := range append(slices.Clip(p.votes), vote{v: p.mine}) {
		if v.v >= lo && v.v <= hi {
			c++
		}
	}
	return c
}

// ---- what is seen, and verdicts ----

// sight is what a look by TCP has seen: first perhaps that the kernel accepts (vSilent), then vRefused,
// vAlive, or that it hung up (vNone).
type sight struct {
	m    Member
	v    verdict
	name string // vAlive: who answered
	born uint64
}

// saw takes what a look has seen.
func (n *node) saw(s sight) {
	d := &n.detector
	if s.m.Addr != n.self.Addr {
		d.heard = n.now
	}
	right := s.v == vAlive && s.name == s.m.Name && s.born == s.m.Born
	if e := n.t.get(s.m.Name); right && e != nil && e != n.self && e.Born == s.born {
		n.met(e)
	}
	if !right && s.v == vAlive {
		s.v = vRefused // another process lives at its address
	}
	for _, p := range d.of(s.m) {
		if p.mine == vSilent && (s.v == vRefused || s.v == vNone) {
			p.mine = vNone // it did not stall: it hung up, or has gone
		}
		d.observed(n, p, s.v)
	}
}

// answered is told that m was heard of by UDP just now: the run born.
func (d *detector) answered(n *node, m Member, born uint64) {
	for _, p := range d.of(m) {
		if born == m.Born {
			p.udp = true
			d.observed(n, p, vAlive)
		}
	}
}

// observed notes what I saw myself.
func (d *detector) observed(n *node, p *probe, v verdict) {
	if v < p.mine || v == p.mine && v != vAlive {
		return
	}
	p.mine = v
	switch {
	case (p.asker != nil || p.e == nil) && (v == vAlive || v == vRefused):
		d.conclude(n, p)
	case v == vAlive && p.udp:
		d.acquit(n, p)
	case v == vRefused:
		d.refused(n, p)
	}
}

// refused fails a target that refuses two observers, nobody contradicting, at once: a watch link showed that TCP works.
func (d *detector) refused(n *node, p *probe) {
	if p.mine <= vRefused && p.ended && p.seen(vRefused, vRefused) >= 2 && p.seen(vAlive, vAlive) == 0 {
		d.fail(n, p)
	}
}

// conclude gives the verdict at the end of a round.
func (d *detector) conclude(n *node, p *probe) {
	if p.asker != nil {
		d.end(p)
		d.vote(n, p)
		return
	} else if p.e == nil {
		d.end(p)
		n.own.found(n, p.m, p.mine == vAlive)
		return
	}
	p.mine = max(p.mine, vUnreachable)
	p.votes = slices.DeleteFunc(p.votes, func(v vote) bool { return n.now-v.when > voteAge })
	deal := p.e.deal()
	switch {
	case p.mine == vAlive: // by TCP alone, or a heartbeat would have acquitted it
		if deal.tcpOnly++; deal.tcpOnly == 2 { // once may be mere loss
			n.logf("[WARN] %s at %s answers TCP but not UDP: is UDP blocked between it and %s?", p.m.Name, p.m.Addr, n.self.Addr)
		}
		n.exchange(p.e.Member) // no flood reaches it
		d.acquit(n, p)
	case p.seen(vAlive, vAlive) > 0:
		d.acquit(n, p)
	case p.seen(vSilent, vSilent) > 0:
		d.stalled(n, p)
	case p.mine == vRefused, p.seen(vRefused, vRefused) >= 2:
		d.fail(n, p)
	case p.last && n.t.alive() > 2 && n.now-d.heard > probeFor:
		d.round(p, n.now+askAfter) // I hear nobody at all: it may be me
	case p.last:
		d.fail(n, p)
	case p.seen(vUnreachable, vRefused) >= 2, n.t.alive() <= 2:
		d.suspect(n, p)
	default: // nobody else could say
		d.round(p, n.now)
	}
}

// round looks anew. Votes survive: helpers that answer late would otherwise stay late, round after round.
func (d *detector) round(p *probe, start time.Duration) {
	p.start, p.pings, p.checks, p.mine, p.udp, p.ended = start, 0, 0, vNone, false, false
}

// acquit ends a probe of a member that somebody reached.
func (d *detector) acquit(n *node, p *probe) {
	d.end(p)
	n.ring.reached(n, p.e)
	p.e.deal().stalled = 0
	if p.e.Status == statusSuspect {
		n.remind(p.e)
	}
}

// stalled handles a member whose kernel accepts while the process is silent. Every busy machine stalls for
// seconds; only ten count as death.
func (d *detector) stalled(n *node, p *probe) {
	deal := p.e.deal()
	if deal.stalled == 0 {
		n.logf("[DEBUG] %s at %s is stalled: it accepts connections and does not answer", p.m.Name, p.m.Addr)
		deal.stalled = p.start
	}
	if n.now-deal.stalled >= stallFor {
		d.fail(n, p)
		return
	}
	// Each round dials anew: a host that vanishes right after it accepted would else count as stalled.
	p.votes = nil
	d.round(p, max(n.now, min(n.now+stallRound-probeFor, deal.stalled+stallFor-probeFor)))
	n.wakeAt(p.start)
}

func (d *detector) end(p *probe) {
	d.probes = slices.DeleteFunc(d.probes, func(o *probe) bool { return o == p })
}

// suspect floods that the target is unreachable, and gives it time to contradict.
func (d *detector) suspect(n *node, p *probe) {
	n.logf("[DEBUG] %s at %s is suspect: nothing at all comes back", p.m.Name, p.m.Addr)
	p.m, p.last = p.e.Member, true
	n.declare(p.m.with(statusSuspect))
	n.inform(p.m, n.claim(p.e))
	d.round(p, n.now+suspectFor-probeFor)
	n.wakeAt(p.start)
}

// fail is the verdict: the target has failed, and everybody shall know.
func (d *detector) fail(n *node, p *probe) {
	d.end(p)
	if p.e.Born == p.m.Born { // else it has restarted, and only the former one is gone
		n.declare(p.e.with(statusFailed))
	}
}

// ---- isolation and retry ----

// stepAlone decides whether I am the one who is cut off. What is then believed of the others stays with me.
func (d *detector) stepAlone(n *node) {
	e := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() })
	if e == nil { // only suspects are left to call
		e = n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.lost })
	}
	switch {
	case e == nil:
		d.calls = 0
	case n.now-d.heard < aloneAfter:
		d.calls = 0
		n.wakeAt(d.heard + aloneAfter)
	case d.calls > 0 && n.now < d.callAt:
		n.wakeAt(d.callAt)
	case d.calls < lastCalls:
		d.calls++
		d.callAt = n.now + lastCallGap
		n.wakeAt(d.callAt)
		n.ping(e.Member)
		n.look(e.Member)
	default:
		d.calls, d.alone = 0, true
		n.logf("[WARN] no member answers: this node seems to be cut off, it goes on trying")
		for _, e := range n.t.ordered {
			n.t.setLost(e, e.lost || e != n.self && !e.Status.dead())
		}
	}
}

// notAlone is told that e has answered.
func (d *detector) notAlone(n *node, e *entry) {
	if d.alone {
		d.alone = false
		n.logf("[INFO] %s answers again", e.Name)
	}
}

// stepRetry pings the failed members, so that a split heals by itself.
func (d *detector) stepRetry(n *node) {
	if n.t.failed == 0 {
		d.retry = bucket{}
		return
	}
	rate := retryRate * float64(n.t.failed) / float64(n.t.total)
	if d.retry.at == 0 {
		d.retry = bucket{n.rng.Float64(), n.now} // or all members ping at the same moments
	}
	if d.retry.fill(n.now, rate, 2).take() {
		if e := n.anyOther(n.t.ordered, func(e *entry) bool { return e.Status == statusFailed || e.lost }); e != nil {
			n.ping(e.Member)
		}
	}
	n.wakeAt(n.now + max(time.Duration((1-d.retry.tokens)/rate*float64(time.Second)), ms))
}
