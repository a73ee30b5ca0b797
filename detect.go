// detect.go: who has died, who only stalls, and whether it is me.
//
// The failure detector is a part of the node (gossip.go): the awake clock, the ring on which heartbeats are
// promised and missed, probes and the votes of helpers, the verdicts that follow, suspicion and its end,
// isolation, and retry. Evidence starts a probe; only what probes see leads to a verdict. How anything travels
// is not known here.

package main

import (
	"cmp"
	"maps"
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

	askAfter    = 100 * ms // a second ping, and helpers
	askOnce     = 300 * ms // more: those that have not voted
	helpFor     = 350 * ms // a helper's vote
	probeFor    = 600 * ms // the end of a round
	suspectFor  = 1500 * ms
	stallFor    = 10 * time.Second
	stallRound  = time.Second
	aloneAfter  = 3 * time.Second
	lastCallGap = 150 * ms
	lastCallFor = 900 * ms
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

// ring is whom I watch, and who watches me.
type ring struct {
	seen     uint64   // version of the table that this follows
	watchers []*entry // in the order of the rings
	watched  []*entry
	nextBeat time.Duration
	linkAt   time.Duration // when to ask for other watch links; never: they are as they shall be
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
	for _, w := range r.watchers {
		if w.deal().promised == 0 || !slices.Contains(watchers, w) {
			r.beat(n, w)
		}
	}
	r.linkAt = min(r.linkAt, n.now+linkAfter)
}

// beat sends w a heartbeat. It promises the first beat that nobody else has been promised: were all new watchers
// told to wait for a whole cycle, nobody would notice before its end that a host vanished right after it had joined.
// From whoever has not answered yet it wants an answer: before that it gets no floods, which it would not take, if
// it has not heard of this node.
func (r *ring) beat(n *node, w *entry) {
	next := max(r.nextBeat, n.now)
	taken := func(o *entry) bool { return o != w && (o.deal().promised-next).Abs() < beatEvery/2 }
	for slices.ContainsFunc(r.watchers, taken) {
		next += beatEvery
	}
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
			r.nextBeat = max(r.nextBeat+beatEvery, n.now+beatEvery/2)
			w := slices.MinFunc(r.watchers, func(a, b *entry) int { return cmp.Compare(a.deal().promised, b.deal().promised) })
			r.beat(n, w)
		}
		n.wakeAt(r.nextBeat)
	}
	for _, e := range r.watched {
		if due := e.deal().due; n.now < due {
			n.wakeAt(due)
		} else {
			n.detector.judge(n, e.Member)
		}
	}
	if n.now >= r.linkAt { // watch links to the first watchers that have answered
		n.out.links, r.linkAt = []Member{}, never
		for _, w := range r.watchers {
			if len(n.out.links) < linkCount && w.deal().met {
				n.out.links = append(n.out.links, w.Member)
			}
		}
	}
	n.wakeAt(r.linkAt)
}

// ---- probes ----

// detector is all probes that run, and whether this node hears anybody.
type detector struct {
	probes    []*probe
	heard     time.Duration // last sign of anybody
	callAt    time.Duration // the next last call
	alone     bool
	retry     bucket
	strangers bucket // what those get who have never answered
}

// probe is one look at a member: for a verdict of mine, of which a target has one at a time, or for somebody who
// asked.
type probe struct {
	m       Member        // whom, as it was believed
	e       *entry        // of that name; my own: a namesake of mine, whom no entry describes
	asker   *entry        // who wants a vote of mine; nil: nobody
	start   time.Duration // of the round
	last    bool          // the target is suspect, and this round decides
	seq     uint32        // of the checks: mine, or what the asker wrote
	stage   int           // of the round: what comes next
	mine    verdict
	stalled time.Duration // since when it accepts without answering; 0: it does not
	ended   bool          // a watch link ended: TCP did work, so two refusals mean that nobody is there
	votes   map[string]verdict
	asked   []*entry // who has not voted yet
}

// of is all probes of one run of a member.
func (d *detector) of(m Member) (ps []*probe) {
	for _, p := range d.probes {
		if p.m.sameRun(m) {
			ps = append(ps, p)
		}
	}
	return ps
}

// probeOf is the probe of e for a verdict of mine, or nil.
func (d *detector) probeOf(e *entry) *probe {
	for _, p := range d.probes {
		if p.e == e && p.asker == nil {
			return p
		}
	}
	return nil
}

func (d *detector) begin(n *node, m Member) *probe {
	n.logf("[TRACE] probing %s at %s", m.Name, m.Addr)
	p := &probe{m: m, e: n.t.get(m.Name), start: n.now, seq: n.nonce(), votes: make(map[string]verdict)}
	d.probes = append(d.probes, p)
	return p
}

// judge probes m for a verdict of mine. Where there are too many probes it has to wait: nil.
func (d *detector) judge(n *node, m Member) *probe {
	p := d.probeOf(n.t.get(m.Name))
	if p == nil && len(d.probes) < maxProbes {
		p = d.begin(n, m)
	}
	return p
}

// linkEnded is told that a watch link with a run of m has ended (tries 0), or for the how manieth time in a
// row that none could be had. It is evidence that starts a probe, never a verdict.
func (n *node) linkEnded(m Member, tries int, refused bool) {
	e := n.t.get(m.Name)
	if n.t.over(m) || e == n.self || e.lost || n.own.leaving != 0 {
		return
	}
	if tries == 4 {
		n.logf("[WARN] no TCP connection to %s at %s lasts: is TCP blocked between it and %s?", m.Name, m.Addr, n.self.Addr)
	}
	if p := n.detector.judge(n, e.Member); p != nil {
		p.ended = p.ended || tries == 0
		if refused {
			p.observed(vRefused)
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
	switch {
	case p.solo(n) && (p.mine == vAlive || p.mine == vRefused):
		d.conclude(n, p)
		return
	case p.e != n.self && (p.e.Born != p.m.Born || p.e.Status.dead()), // that run is over
		p.last && (p.e.Status != statusSuspect || p.e.Incarnation != p.m.Incarnation): // it has refuted
		d.end(p)
		return
	case p.ended && p.mine <= vRefused && p.seen(vRefused) >= 2 && p.seen(vAlive) == 0: // nobody contradicts
		d.fail(n, p)
		return
	}
	due := [...]time.Duration{0, askAfter, askOnce, probeFor}
	if p.mine == vRefused {
		due[1] = 0
	}
	if p.asker != nil {
		due[3] = helpFor
	}
	for ; n.now >= p.start+due[p.stage]; p.stage++ {
		switch p.stage {
		case 0:
			p.asked = n.helpers(p)
			n.look(p.m)
			n.ping(p.m)
		case 1:
			n.ping(p.m)
			d.check(n, p)
		case 2:
			d.check(n, p)
		default:
			d.conclude(n, p)
			return
		}
	}
	n.wakeAt(p.start + due[p.stage])
}

// solo reports whether what I see is the verdict: a helper asks nobody, and of a namesake nobody else can tell.
func (p *probe) solo(n *node) bool { return p.asker != nil || p.e == n.self }

// helpers are the target's other watchers and one random member.
func (n *node) helpers(p *probe) []*entry {
	if p.solo(n) {
		return nil
	}
	hs := slices.DeleteFunc(n.t.watchers(p.e), func(w *entry) bool { return w == n.self })
	if r := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() && e != p.e && !slices.Contains(hs, e) }); r != nil {
		hs = append(hs, r)
	}
	return hs
}

// check asks the helpers that have not voted in this round.
func (d *detector) check(n *node, p *probe) {
	h := n.head(kCheck)
	h.Seq, h.Target = p.seq, p.m.Name
	for _, w := range p.asked {
		n.send(w.Member, h, nil)
	}
}

// anyOther picks one of the others in list for which ok holds, or nil; the list holds this node, too. Who
// follows a row that does not count is picked more often: on a ring, the one that had to watch that row.
func (n *node) anyOther(list []*entry, ok func(*entry) bool) *entry {
	at := n.rng.IntN(len(list))
	for i := range list {
		if e := list[(at+i)%len(list)]; e != n.self && ok(e) {
			return e
		}
	}
	return nil
}

// asked answers the check of by, at once where the answer is known and within helpFor else. Only members are
// looked at, at the address that I know.
func (d *detector) asked(n *node, by *entry, h head) {
	e := n.t.get(h.Target)
	again := func(p *probe) bool { return p.asker == by && p.seq == h.Seq }
	switch {
	case e == nil || e == n.self || by.Status.dead() || slices.ContainsFunc(d.probes, again):
	case e.Status.dead(): // the asker has missed it, and may have nobody else to ask
		d.vote(n, &probe{m: e.Member, asker: by, seq: h.Seq})
	case len(d.probes) < maxProbes/2: // I have my own to look at
		running := d.of(e.Member)
		p := d.begin(n, e.Member)
		p.asker, p.seq = by, h.Seq
		if len(running) > 0 && running[0].stage > 0 { // one look will do for all
			p.stage = 3
			p.observed(running[0].mine)
		}
	}
}

// vote tells the asker what was seen, and of which run: a helper that knows a newer one would else acquit the old
// one for ever.
func (d *detector) vote(n *node, p *probe) {
	h := n.head(kVote)
	h.Seq, h.Target, h.Verdict = p.seq, p.m.Name, max(p.mine, vUnreachable)
	n.send(p.asker.Member, h, wire.encode(nil, &update{Member: p.m}))
}

// voted takes a helper's answer, if it is one to a probe that still runs. One about another run is news of that.
func (d *detector) voted(n *node, by *entry, h head, us []update) {
	p := d.probeOf(n.t.get(h.Target))
	switch {
	case p == nil || p.seq != h.Seq || len(us) != 1 || us[0].Member.Name != h.Target || by == p.e || by.Status.dead():
	case us[0].Member.Born == p.m.Born:
		p.count(by.Name, min(h.Verdict, vAlive))
	case !us[0].Member.Status.dead():
		n.learn(&us[0], by.Name, nil)
	}
}

// count counts what somebody else saw.
func (p *probe) count(by string, v verdict) {
	p.votes[by] = v
	p.asked = slices.DeleteFunc(p.asked, func(w *entry) bool { return w.Name == by })
}

// seen counts the observers that saw v, me included.
func (p *probe) seen(v verdict) (c int) {
	for _, o := range append(slices.Collect(maps.Values(p.votes)), p.mine) {
		if o == v {
			c++
		}
	}
	return c
}

// ---- what is seen, and verdicts ----

// saw takes what a look by TCP has seen: first perhaps that the kernel accepts (vSilent), then vRefused, that it hung
// up (vNone), or vAlive and w, the welcome of who is there.
func (n *node) saw(m Member, v verdict, w head) {
	if m.Addr != n.self.Addr {
		n.detector.heard = n.now
	}
	if v == vAlive && (w.From != m.Name || w.born() != m.Born) {
		v = vRefused // another process lives at its address
	}
	if e := n.t.get(m.Name); v == vAlive && e != nil && e != n.self && e.Born == m.Born {
		n.met(e)
	}
	for _, p := range n.detector.of(m) {
		p.observed(v)
	}
}

// answered is told that m was heard of by UDP just now.
func (d *detector) answered(n *node, m Member) {
	for _, p := range d.of(m) {
		if p.solo(n) {
			p.observed(vAlive)
		} else {
			d.acquit(n, p)
		}
	}
}

// observed notes what I saw myself. What accepts in silence did not stall when it hangs up then, or has gone.
func (p *probe) observed(v verdict) {
	if v > p.mine || p.mine == vSilent {
		p.mine = v
	}
}

// conclude gives the verdict at the end of a round.
func (d *detector) conclude(n *node, p *probe) {
	switch {
	case p.asker != nil:
		d.end(p)
		d.vote(n, p)
	case p.e == n.self:
		d.end(p)
		n.own.found(n, p.m, p.mine == vAlive)
	case p.mine == vAlive: // by TCP alone, or a heartbeat would have acquitted it
		deal := p.e.deal()
		if deal.tcpOnly++; deal.tcpOnly == 2 { // once may be mere loss
			n.logf("[WARN] %s at %s answers TCP but not UDP: is UDP blocked between it and %s?", p.m.Name, p.m.Addr, n.self.Addr)
		}
		n.exchange(p.e.Member) // no flood reaches it
		d.acquit(n, p)
	case p.seen(vAlive) > 0:
		d.acquit(n, p)
	case p.seen(vSilent) > 0:
		d.stalled(n, p)
	case p.mine == vRefused, p.seen(vRefused) >= 2:
		d.fail(n, p)
	case p.last && n.t.alive() > 2 && n.now-d.heard > probeFor:
		d.round(n, p, n.now+askAfter) // I hear nobody at all: it may be me
	case p.last:
		d.fail(n, p)
	case len(p.votes) > 0, n.t.alive() <= 2: // nobody else reaches it either
		d.suspect(n, p)
	default: // nobody else could say
		d.round(n, p, n.now)
	}
}

// round looks anew. Votes survive: helpers that answer late would otherwise stay late, round after round.
func (d *detector) round(n *node, p *probe, start time.Duration) {
	n.wakeAt(start)
	p.start, p.stage, p.mine, p.ended = start, 0, vNone, false
}

// acquit ends a probe of a member that somebody reached.
func (d *detector) acquit(n *node, p *probe) {
	d.end(p)
	// What it promised before holds, or a whole cycle may pass: this sign of life promises nothing.
	if deal := p.e.deal(); deal.due <= n.now {
		deal.due = n.now + time.Duration(min(rings, n.t.alive()-1)+1)*beatEvery + overdueAfter
	}
}

// stalled handles a member whose kernel accepts while the process is silent. Every busy machine stalls for
// seconds; only ten count as death.
func (d *detector) stalled(n *node, p *probe) {
	if p.stalled == 0 {
		n.logf("[DEBUG] %s at %s is stalled: it accepts connections and does not answer", p.m.Name, p.m.Addr)
		p.stalled = p.start
	}
	end := p.stalled + stallFor
	if n.now >= end {
		d.fail(n, p)
		return
	}
	// Each round dials anew: a host that vanishes right after it accepted would else count as stalled.
	clear(p.votes)
	d.round(n, p, max(n.now, min(n.now+stallRound, end)-probeFor))
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
	d.round(n, p, n.now+suspectFor-probeFor)
}

// fail is the verdict: the target has failed, and everybody shall know.
func (d *detector) fail(n *node, p *probe) {
	d.end(p)
	n.declare(p.e.with(statusFailed))
}

// ---- isolation and retry ----

// stepAlone decides whether I am the one who is cut off. What is then believed of the others stays with me.
func (d *detector) stepAlone(n *node) {
	silent := n.now - d.heard
	if silent < aloneAfter {
		n.wakeAt(d.heard + aloneAfter)
		return
	}
	switch e := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.lost }); {
	case e == nil:
	case silent >= aloneAfter+lastCallFor:
		d.alone = true
		n.logf("[WARN] no member answers: this node seems to be cut off, it goes on trying")
		for _, e := range n.t.ordered {
			n.t.setLost(e, e.lost || e != n.self && !e.Status.dead())
		}
	case n.now >= d.callAt:
		d.callAt = n.now + lastCallGap
		n.ping(e.Member)
		n.look(e.Member)
		fallthrough
	default:
		n.wakeAt(d.callAt)
	}
}

// stepRetry pings the failed members, so that a split heals by itself.
func (d *detector) stepRetry(n *node) {
	rate := retryRate * float64(n.t.failed) / float64(n.t.total)
	if d.retry.fill(n.now, rate, 2).take() {
		if e := n.anyOther(n.t.ordered, func(e *entry) bool { return e.visible() == statusFailed }); e != nil {
			n.ping(e.Member)
		}
	}
	if rate > 0 {
		n.wakeAt(n.now + max(time.Duration((1-d.retry.tokens)/rate*float64(time.Second)), ms))
	}
}
