// detect.go: who has died, who only stalls, and whether it is me.
//
// The failure detector of the node (gossip.go): probes and the votes of helpers,
// the verdicts that follow, suspicion and its end, and isolation. Evidence
// starts a probe; only what probes see leads to a verdict.

package main

import (
	"net/netip"
	"slices"
	"time"
)

// ---- probes and verdicts ----

// probe is one look at a member: for a verdict of my own (judge), for others
// who asked, or both. There is one at a time per target.
type probe struct {
	e      *entry
	born   uint64
	inc    uint64
	judge  bool
	fresh  bool // the last probe of a suspicion, whose end stepAccused awaits
	start  time.Duration
	seq    uint32
	pings  int
	dials  int
	resets int // dials that were accepted and cut off
	checks int
	mine   verdict
	udp    bool // the target answered by UDP
	ended  bool // a watch link ended: TCP did work, so a refusal means that nobody is there
	votes  []vote
	asked  []*entry
	askers []asker
}

type vote struct {
	by   string
	v    verdict
	when time.Duration
}

type asker struct {
	addr netip.AddrPort
	name string
	seq  uint32
	by   time.Duration
	sent verdict
}

// suspicion is an accusation of mine that has been flooded.
type suspicion struct {
	e     *entry
	inc   uint64
	since time.Duration
	probe bool // the fresh probe has begun
}

func (n *node) probeOf(e *entry) *probe {
	for _, p := range n.probes {
		if p.e == e {
			return p
		}
	}
	return nil
}

// startProbe begins a look at e to judge it, or makes a running look judge.
func (n *node) startProbe(e *entry) *probe {
	p := n.probeOf(e)
	if p == nil {
		if p = n.look(e); p == nil {
			return nil
		}
	}
	if !p.judge {
		p.judge, p.start = true, n.now
	}
	return p
}

func (n *node) look(e *entry) *probe {
	// Whatever others ask for, those that I watch (due) are always looked at.
	if e == n.self || e.Status.dead() || len(n.probes) >= maxProbes && n.peer(e).due == 0 {
		return nil
	}
	n.logf("[TRACE] probing %s at %s", e.Name, e.Addr)
	p := &probe{e: e, born: e.Born, inc: e.Incarnation, start: n.now, seq: n.nextSeq()}
	n.probes = append(n.probes, p)
	return p
}

func (n *node) stepProbes() {
	for _, p := range slices.Clone(n.probes) {
		n.stepProbe(p)
	}
}

// stepProbe sends what is due. A lost SYN costs a second in the kernel, so the
// dial is made anew instead; a refused dial leaves only others to ask.
func (n *node) stepProbe(p *probe) {
	if p.e.Born != p.born || p.e.Status.dead() {
		n.endProbe(p)
		return
	}
	age := n.now - p.start
	if p.pings == 0 || p.pings == 1 && (age >= 100*ms || p.mine == vRefused) {
		p.pings++
		h := n.head(kPing)
		h.Seq, h.Target = p.seq, p.e.Name
		n.send(p.e, h)
	}
	if due := []time.Duration{0, 150 * ms, 300 * ms}; p.dials < len(due) && age >= due[p.dials] && p.mine < vRefused {
		p.dials++
		n.dialLook(p)
	}
	if p.judge && (p.checks == 0 && (age >= 100*ms || p.mine == vRefused) || p.checks == 1 && age >= 300*ms) {
		p.checks++
		n.askOthers(p)
	}
	for i := range p.askers {
		if a := &p.askers[i]; a.sent == vNone && n.now >= a.by {
			n.vote(p, a)
		}
	}
	switch {
	case p.judge && age >= probeFor:
		n.conclude(p)
	case !p.judge && !slices.ContainsFunc(p.askers, func(a asker) bool { return n.now < a.by }):
		n.endProbe(p)
	default:
		for _, d := range []time.Duration{100 * ms, 150 * ms, 300 * ms, helpFor, probeFor} {
			if age < d {
				n.at(p.start + d)
			}
		}
		for _, a := range p.askers {
			if a.by > n.now {
				n.at(a.by)
			}
		}
	}
}

// askOthers sends checks to the target's other watchers and one random member,
// and again to those that have not answered.
func (n *node) askOthers(p *probe) {
	if p.checks == 1 {
		p.asked = nil
		for _, w := range n.t.watchers(p.e) {
			if w != n.self {
				p.asked = append(p.asked, w)
			}
		}
		if r := n.randomAlive(func(e *entry) bool { return e == p.e || slices.Contains(p.asked, e) }); r != nil {
			p.asked = append(p.asked, r)
		}
	}
	h := n.head(kCheck)
	h.Seq, h.Target = p.seq, p.e.Name
	for _, w := range p.asked {
		if !slices.ContainsFunc(p.votes, func(v vote) bool { return v.by == w.Name && v.when >= p.start }) {
			n.send(w, h)
		}
	}
}

// randomAlive picks a member other than me that is believed alive, or nil.
func (n *node) randomAlive(not func(*entry) bool) *entry {
	ring := n.t.ring[0]
	if len(ring) == 0 {
		return nil
	}
	at := n.rng.IntN(len(ring))
	for i := range ring {
		if e := ring[(at+i)%len(ring)]; e != n.self && !e.skipped() && !not(e) {
			return e
		}
	}
	return nil
}

// asked answers a check, at once where the answer is known and within helpFor
// else. Only known members are looked at, at the address that I know.
func (n *node) asked(h head) {
	e, by := n.t.get(h.Target), n.t.get(h.From)
	if e == nil || e == n.self || by == nil || by.Status.dead() {
		return
	}
	if e.Status.dead() { // the asker has missed it, and may have nobody else to ask
		v := n.head(kVote)
		v.Seq, v.Target, v.Verdict = h.Seq, e.Name, vUnreachable
		n.send(by, v)
		return
	}
	a := asker{addr: by.Addr, name: h.From, seq: h.Seq, by: n.now + helpFor}
	p := n.probeOf(e)
	if p == nil {
		if p = n.look(e); p == nil {
			return
		}
	}
	if i := slices.IndexFunc(p.askers, func(b asker) bool { return b.name == a.name && b.seq == a.seq }); i >= 0 {
		// The vote was lost, or this is the next round.
		switch b := &p.askers[i]; {
		case b.sent != vNone && p.mine == vNone:
			*b = a
		case b.sent != vNone:
			n.vote(p, b)
		}
		return
	}
	if len(p.askers) >= 64 {
		return
	}
	p.askers = append(p.askers, a)
	if p.mine >= vRefused && p.mine != vSilent {
		n.vote(p, &p.askers[len(p.askers)-1])
	}
}

func (n *node) vote(p *probe, a *asker) {
	a.sent = max(p.mine, vUnreachable)
	h := n.head(kVote)
	h.Seq, h.Target, h.Verdict = a.seq, p.e.Name, a.sent
	n.sendTo(a.addr, a.name, h)
}

// voted takes a helper's answer, if it is one to a probe that still runs.
func (n *node) voted(h head) {
	by := n.t.get(h.From)
	for _, p := range n.probes {
		if p.seq != h.Seq || p.e.Name != h.Target || h.From == h.Target || by == nil || by.Status.dead() {
			continue
		}
		n.addVote(p, h.From, min(h.Verdict, vAlive))
		return
	}
}

func (n *node) addVote(p *probe, by string, v verdict) {
	p.votes = slices.DeleteFunc(p.votes, func(o vote) bool { return o.by == by })
	p.votes = append(p.votes, vote{by, v, n.now})
	if p.mine <= vRefused && p.judge && p.ended && p.count(vRefused, vRefused) >= 2 && p.count(vAlive, vAlive) == 0 {
		n.fail(p) // refused, by two observers
	}
}

// count counts the observers whose verdict lies between lo and hi, me included.
func (p *probe) count(lo, hi verdict) int {
	c := 0
	if p.mine >= lo && p.mine <= hi {
		c++
	}
	for _, v := range p.votes {
		if v.v >= lo && v.v <= hi {
			c++
		}
	}
	return c
}

// acked takes the answer to a ping. Only an answer to a running question
// counts: a recorded one would keep a dead member alive.
func (n *node) acked(h head) {
	if n.leave != nil {
		n.leave.waiting = slices.DeleteFunc(n.leave.waiting, func(e *entry) bool { return e.Name == h.From && n.leave.seq == h.Seq })
		return
	}
	if r := n.rival; r != nil && r.seq == h.Seq && h.From == n.self.Name && h.born() != n.self.Born {
		n.rivalAnswered(h.born())
		return
	}
	e := n.t.get(h.From)
	if e == nil {
		return
	}
	if h.born() != e.Born {
		// Who failed has restarted, and may know nobody to join.
		if p := n.peer(e); e.Status == StatusFailed && p.pinged != 0 && p.pinged == h.Seq {
			p.pinged = 0
			n.exchange(e)
		}
		return
	}
	p := n.probeOf(e)
	isProbe := p != nil && p.seq == h.Seq
	if isProbe {
		p.udp = true
		n.peer(e).tcpOnly = 0
		d := n.awaited()
		if due := n.peer(e).due; due > n.now {
			d = due - n.now // its promise still holds
		}
		n.seen(e, d)
	}
	if pe := n.peer(e); isProbe || pe.pinged != 0 && pe.pinged == h.Seq {
		pe.pinged = 0 // each question has one answer: a recorded one revives nobody
		n.twoWay(e)
	}
}

// awaited is how long to wait for a member that answered without a promise.
func (n *node) awaited() time.Duration {
	return time.Duration(min(rings, n.t.alive()-1)+1)*beatEvery + overdueAfter
}

// observed notes what I saw myself.
func (n *node) observed(p *probe, v verdict) {
	if v < p.mine || v == p.mine && v != vAlive {
		return
	}
	p.mine = v
	if v == vRefused || v == vAlive {
		for i := range p.askers {
			if p.askers[i].sent != v {
				n.vote(p, &p.askers[i])
			}
		}
	}
	switch {
	case v == vAlive && (p.udp || n.peer(p.e).beat != 0 && n.peer(p.e).due > n.now):
		n.endProbe(p)
	case v == vRefused && p.judge && p.ended && p.count(vRefused, vRefused) >= 2 && p.count(vAlive, vAlive) == 0:
		n.fail(p)
	}
}

// conclude gives the verdict at the end of a round.
func (n *node) conclude(p *probe) {
	pe := n.peer(p.e)
	p.mine = max(p.mine, vUnreachable)
	p.votes = slices.DeleteFunc(p.votes, func(v vote) bool { return n.now-v.when > voteAge })
	witnesses := n.t.alive() > 2 // somebody else could have looked
	switch {
	case p.mine == vAlive:
		if !p.udp {
			pe.tcpOnly++
			n.exchange(p.e) // no flood reaches it
		}
		if !p.udp && pe.tcpOnly == 2 { // once may be mere loss
			n.logf("[WARN] %s at %s answers TCP but not UDP: is UDP blocked between it and %s?", p.e.Name, p.e.Addr, n.self.Addr)
		}
		n.acquit(p)
	case p.count(vAlive, vAlive) > 0:
		n.acquit(p)
	case p.count(vSilent, vSilent) > 0:
		n.stalledRound(p, pe)
	case p.mine == vRefused, p.count(vRefused, vRefused) >= 2:
		n.fail(p)
	case p.fresh:
		n.endProbe(p) // stepAccused decides
	case p.count(vUnreachable, vRefused) >= 2, !witnesses:
		n.suspect(p)
	default:
		n.nextRound(p, n.now)
	}
}

// acquit ends a probe of a member that somebody reached.
func (n *node) acquit(p *probe) {
	if pe := n.peer(p.e); pe.due != 0 {
		pe.due = n.now + n.awaited()
	}
	n.endProbe(p)
	n.unaccuse(p.e)
	if p.e.Status == StatusSuspect {
		n.tell(p.e, p.e.Born)
	}
}

// nextRound looks again. Votes survive: helpers that answer late would
// otherwise stay late, round after round.
func (n *node) nextRound(p *probe, start time.Duration) {
	n.dropLooks(p)
	*p = probe{e: p.e, born: p.born, inc: p.inc, judge: true, start: start, seq: p.seq, votes: p.votes, askers: p.askers}
	n.at(start)
}

// stalledRound handles a member whose kernel accepts while the process is
// silent. Every busy machine stalls for seconds; only ten count as death.
func (n *node) stalledRound(p *probe, pe *peer) {
	if pe.stalled == 0 {
		n.logf("[DEBUG] %s at %s is stalled: it accepts connections and does not answer", p.e.Name, p.e.Addr)
		pe.stalled = p.start
	}
	n.unaccuse(p.e) // it is not unreachable
	if n.now-pe.stalled >= stallFor {
		n.fail(p)
		return
	}
	// Each round dials anew: a host that vanishes right after it accepted would
	// else count as stalled.
	p.votes = nil
	n.nextRound(p, max(n.now, min(n.now+stallRound-probeFor, pe.stalled+stallFor-probeFor)))
}

func (n *node) endProbe(p *probe) {
	n.dropLooks(p)
	n.probes = slices.DeleteFunc(n.probes, func(o *probe) bool { return o == p })
}

// suspect floods that e is unreachable, and gives it time to contradict.
func (n *node) suspect(p *probe) {
	n.endProbe(p)
	n.logf("[DEBUG] %s at %s is suspect: nothing at all comes back", p.e.Name, p.e.Addr)
	m := p.e.Member
	m.Status = StatusSuspect
	if p.e.Status == StatusAlive && n.t.apply(n.now, m, 0) {
		n.flood(m.Name, n.claim(p.e, n.self.Name))
	}
	n.send(p.e, n.head(kFlood), n.claim(p.e, n.self.Name))
	if !slices.ContainsFunc(n.accused, func(s *suspicion) bool { return s.e == p.e }) {
		n.accused = append(n.accused, &suspicion{e: p.e, inc: m.Incarnation, since: n.now})
	}
}

// stepAccused carries suspicions of mine to their end: a refutation, or a
// fresh probe that finds nothing either.
func (n *node) stepAccused() {
	for _, s := range slices.Clone(n.accused) {
		probing := n.probeOf(s.e)
		switch {
		case s.e.Status != StatusSuspect || s.e.Incarnation != s.inc:
			n.unaccuse(s.e)
		case !s.probe && n.now-s.since >= suspectFor-probeFor:
			s.probe = true
			if probing != nil {
				n.endProbe(probing)
			}
			if p := n.startProbe(s.e); p != nil {
				p.fresh = true
				n.stepProbe(p)
			}
		case !s.probe:
			n.at(s.since + suspectFor - probeFor)
		case probing == nil && n.now-s.since < suspectFor: // it answered
			n.unaccuse(s.e)
		case probing == nil && n.t.alive() > 2 && n.now-n.heard > probeFor:
			// I hear nobody at all: it may be me. Look again.
			s.probe, s.since = false, n.now-(suspectFor-probeFor)
			n.at(n.now + 100*ms)
		case probing == nil:
			n.unaccuse(s.e)
			n.failEntry(s.e)
		}
	}
}

func (n *node) unaccuse(e *entry) {
	n.accused = slices.DeleteFunc(n.accused, func(s *suspicion) bool { return s.e == e })
}

func (n *node) fail(p *probe) {
	n.endProbe(p)
	if p.e.Born == p.born { // else it has restarted, and only the former one is gone
		n.failEntry(p.e)
	}
}

// failEntry is the verdict: e has failed, and everybody shall know.
func (n *node) failEntry(e *entry) {
	n.peer(e).stalled = 0
	m := e.Member
	m.Status = StatusFailed
	if n.t.apply(n.now, m, 0) {
		n.flood(m.Name, n.claim(e, ""))
	}
}

// ---- isolation ----

// stepAlone decides whether I am the one who is cut off. What is then believed
// of the others stays with me.
func (n *node) stepAlone() {
	others := slices.ContainsFunc(n.t.ring[0], func(e *entry) bool { return e != n.self && !e.lost })
	if !others || n.now-n.heard < aloneAfter {
		n.calls = 0
		if others {
			n.at(n.heard + aloneAfter)
		}
		return
	}
	if n.calls > 0 && n.now < n.callAt {
		n.at(n.callAt)
		return
	}
	if n.calls == lastCalls {
		n.calls, n.alone = 0, true
		n.logf("[WARN] no member answers: this node seems to be cut off, it goes on trying")
		for _, e := range n.t.ordered {
			if e != n.self && !e.Status.dead() {
				n.t.setLost(e, true)
			}
		}
		return
	}
	n.calls++
	n.callAt = n.now + lastCallGap
	n.at(n.callAt)
	e := n.randomAlive(func(*entry) bool { return false })
	if e == nil { // only suspects are left to call
		e = n.anyOther(func(e *entry) bool { return !e.Status.dead() && !e.lost })
	}
	n.ping(e)
	n.dial(e.Addr, kLook, e.Name)
}

// ping asks e for a sign of life outside of any probe.
func (n *node) ping(e *entry) {
	h := n.head(kPing)
	h.Seq, h.Target = n.nextSeq(), e.Name
	n.peer(e).pinged = h.Seq
	n.send(e, h)
}

// twoWay notes that e answered something that I sent it just now: neither of
// us is cut off from the other, whatever was believed.
func (n *node) twoWay(e *entry) {
	if n.alone {
		n.alone = false
		n.logf("[INFO] %s answers again", e.Name)
	}
	was := e.lost
	n.peer(e).answered = n.now
	n.t.setLost(e, false)
	switch {
	case e.Status == StatusFailed || e.Status == StatusSuspect:
		n.tell(e, e.Born)
	case was:
		n.exchange(e)
	}
}

// stepRetry pings the failed members, so that a split heals by itself.
func (n *node) stepRetry() {
	if n.failed == 0 {
		n.retryAt, n.retryAcc = 0, 0
		return
	}
	rate := retryRate * float64(n.failed) / float64(n.total)
	if n.retryAt == 0 {
		n.retryAcc = n.rng.Float64() // or all members ping at the same moments
	} else {
		n.retryAcc += rate * (n.now - n.retryAt).Seconds()
	}
	n.retryAt = n.now
	if n.retryAcc >= 1 {
		n.retryAcc = min(n.retryAcc-1, 1)
		if e := n.anyOther(func(e *entry) bool { return e.Status == StatusFailed || e.lost }); e != nil {
			n.ping(e)
		}
	}
	n.at(n.now + max(time.Duration((1-n.retryAcc)/rate*float64(time.Second)), ms))
}

// anyOther picks one of the other members for which ok holds, or nil.
func (n *node) anyOther(ok func(*entry) bool) *entry {
	at := n.rng.IntN(len(n.t.ordered))
	for i := range n.t.ordered {
		e := n.t.ordered[(at+i)%len(n.t.ordered)]
		if e != n.self && !e.reaped && ok(e) {
			return e
		}
	}
	return nil
}
