// detect_test.go: the failure detector of one node, as transcripts, and the
// stories of whole clusters about death, silence and isolation.

package main

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func TestProbeRefusedTwiceFailsAKilledProcess(t *testing.T) {
	l := newLab(t, 3)
	l.breaks(1)
	l.sees(1, verdictRefused)
	l.udp(2, header{Kind: msgProbeResult, Seq: l.check("b"), Target: "b", Verdict: verdictRefused})
	l.want(`
		link to b breaks
		  to b: ping b
		  looks at b
		look at b: refused
		  to b: ping b
		  to c: check b
		c says vote b refused [b alive 10]
		  to c: flood [b failed 10]
		  event member-failed b
	`)
}

func TestProbeRefusedOnceIsNoVerdictWhenAHelperReachesTheMember(t *testing.T) {
	l := newLab(t, 3)
	l.breaks(1)
	l.sees(1, verdictRefused)
	l.udp(2, header{Kind: msgProbeResult, Seq: l.check("b"), Target: "b", Verdict: verdictAlive})
	l.text.Reset()
	l.after(700 * ms)
	if e := l.n.table.get("b"); e.Status != statusAlive {
		t.Errorf("b is %v\n%s", e.Status, l.text.String())
	}
}

func TestProbeOfAVanishedHostSuspectsItThenFailsIt(t *testing.T) {
	l := newLab(t, 4)
	l.udp(1, header{Kind: msgHeartbeat, Promise: 500})
	l.udp(2, header{Kind: msgHeartbeat, Promise: 9000})
	l.udp(3, header{Kind: msgHeartbeat, Promise: 9000})
	l.after(650 * ms)
	l.udp(2, header{Kind: msgProbeResult, Seq: l.check("b"), Target: "b", Verdict: verdictUnreachable})
	l.text.Reset()
	l.after(600 * ms)
	l.want(`
		600ms pass
		  to b: ping b
		  to d: check b
		  to d: check b
		  to b: flood [b suspect 10]
		  to d: flood [b suspect 10]
		  to c: flood [b suspect 10]
		  log [DEBUG] b at 10.0.0.2:7946 is suspect: nothing at all comes back
	`)
	l.after(time.Second)
	l.udp(2, header{Kind: msgHeartbeat, Promise: 9000})
	l.text.Reset()
	l.after(550 * ms)
	if e := l.n.table.get("b"); e.Status != statusFailed {
		t.Errorf("b is %v\n%s", e.Status, l.text.String())
	}
}

func TestSuspicionThatIsRefutedFailsNobody(t *testing.T) {
	l := newLab(t, 2)
	l.after(newWatchGrace + probeTimeout + 10*ms)
	if l.n.table.get("b").Status != statusSuspect {
		t.Fatalf("b is not suspect:\n%s", l.text.String())
	}
	again := labMember(1)
	again.Incarnation = 11
	l.udp(1, header{Kind: msgBroadcast, From: "b", Incarnation: 11, Raised: 1}, claimed(again, statusAlive))
	l.text.Reset()
	l.udp(1, header{Kind: msgHeartbeat, From: "b", Incarnation: 11, Raised: 1, Promise: 9000})
	l.after(2 * time.Second)
	if l.n.table.get("b").Status != statusAlive || len(l.n.detector.probes) > 0 {
		t.Errorf("b is %v:\n%s", l.n.table.get("b").Status, l.text.String())
	}
}

// Helpers that knew where b had moved reached it there, and kept the old one alive
// for the peers that had missed the news.
func TestProbeResultOfANewerInstanceIsNewsAndNoAcquittal(t *testing.T) {
	l := newLab(t, 4)
	l.breaks(1)
	l.after(200 * ms)
	moved := labMember(1)
	moved.Instance, moved.Incarnation, moved.Addr = 20, 20, labMember(9).Addr
	hdr := l.head(2, header{Kind: msgProbeResult, Seq: l.check("b"), Target: "b", Verdict: verdictAlive})
	l.raw(2, wire.encode(nil, &hdr, update{Member: moved}))
	if e := l.n.table.get("b"); e.Addr != moved.Addr || e.Instance != 20 {
		t.Errorf("it believes %v, want %v", e.Member, moved)
	}
	// An older instance than the known one is no news, and what was seen of it does not count.
	l = newLab(t, 4)
	l.breaks(1)
	l.after(200 * ms)
	former := labMember(1)
	former.Instance, former.Incarnation = 5, 5
	hdr = l.head(2, header{Kind: msgProbeResult, Seq: l.check("b"), Target: "b", Verdict: verdictAlive})
	l.raw(2, wire.encode(nil, &hdr, update{Member: former}))
	if p := l.n.detector.ownProbe(l.n.table.get("b")); p == nil || len(p.results) > 0 || l.n.table.get("b").Instance != 10 {
		t.Errorf("the probe has ended, or has a vote")
	}
}

func TestProbeAcceptedInSilenceFailsAfterTenSeconds(t *testing.T) {
	l := newLab(t, 2)
	died := time.Duration(0)
	for l.now < 20*time.Second && died == 0 {
		l.after(50 * ms)
		if k, ok := l.looks["b"]; ok {
			delete(l.looks, "b")
			l.tell("", func(n *node) { n.detector.handleTCPProbeResult(n, k, verdictSilent, header{}) })
		}
		if l.n.table.get("b").Status == statusFailed {
			died = l.now
		}
	}
	if died < stallTimeout || died > stallTimeout+3*time.Second || strings.Count(l.text.String(), "is stalled") != 1 || strings.Contains(l.text.String(), "flood") && died == 0 {
		t.Errorf("called failed after %v:\n%s", died, l.text.String())
	}
}

func TestProbeForAPeerBetweenTwoRoundsDialsAnew(t *testing.T) {
	l := newLab(t, 3)
	l.udp(2, header{Kind: msgHeartbeat, Promise: 9000})
	l.breaks(1)
	l.sees(1, verdictSilent)
	l.after(probeTimeout + 10*ms) // it is stalled, and the next round begins later
	l.text.Reset()
	l.udp(2, header{Kind: msgIndirectProbe, Seq: 7, Target: "b"})
	l.sees(1, verdictSilent)
	l.after(helperTimeout + 10*ms)
	l.want(`
		c says check b
		  to b: ping b
		  looks at b
		look at b: accepted
		360ms pass
		  to b: ping b
		  to c: vote b accepted [b alive 10]
	`)
}

func TestProbeForAPeerGoesOnlyToTheAddressOfAKnownMember(t *testing.T) {
	l := newLab(t, 3)
	l.udp(1, header{Kind: msgIndirectProbe, Seq: 1, Target: "stranger"})
	l.udp(1, header{Kind: msgIndirectProbe, Seq: 2, Target: "c"})
	l.want(`
		b says check stranger
		b says check c
		  to c: ping c
		  looks at c
	`)
	l.sees(2, verdictAlive)
	l.want(`
		look at c: alive
		  to b: vote c alive [c alive 10]
	`)
}

func TestProbeAfterAStopWaitsForWhatHasArrived(t *testing.T) {
	l := newLab(t, 2)
	l.udp(1, header{Kind: msgHeartbeat, Promise: 500})
	l.text.Reset()
	l.now += 8 * time.Second
	beat := l.head(1, header{Kind: msgHeartbeat, Promise: 500})
	l.n.step(l.now, func(n *node) { n.handleDatagram(labMember(1).Addr, wire.encode(nil, &beat), false) })
	l.after(400 * ms)
	if strings.Contains(l.text.String(), "ping") {
		t.Errorf("it doubts b:\n%s", l.text.String())
	}
}

// A claim about the same run, here its new tags, once wiped what was known of any
// member that had never sent a heartbeat here, and stretched its deadline.
func TestClaimAboutTheSameInstancePutsOffNoDeadline(t *testing.T) {
	l := newLab(t, 3)
	l.udp(2, header{Kind: msgHeartbeat, Promise: 9000})
	e := l.n.table.get("b")
	e.peer().tcpOnly = 1
	e.peer().due = l.n.now + 100*ms
	again := labMember(1)
	again.Incarnation, again.Tags = 11, "k=v"
	l.udp(2, header{Kind: msgBroadcast}, claimed(again, statusAlive))
	if d := e.peer(); d.tcpOnly == 0 || !d.validated {
		t.Errorf("what was known of this run is gone: %+v", d)
	}
	l.text.Reset()
	l.after(110 * ms)
	if !strings.Contains(l.text.String(), "ping b") {
		t.Errorf("b is overdue and not probed:\n%s", l.text.String())
	}
	again.Instance, again.Incarnation = 20, 20
	l.udp(2, header{Kind: msgBroadcast}, claimed(again, statusAlive))
	if d := e.peer(); d.tcpOnly != 0 || d.validated {
		t.Errorf("what was seen of a former run is held against this one: %+v", d)
	}
}

// A reader of what the table counts must not hide it from the next one.
func TestRingFollowsEachChangeHoweverOftenItIsLookedAt(t *testing.T) {
	l := newLab(t, 3)
	l.n.step(l.now, func(n *node) {
		n.table.apply(n.now, labMember(3), 0)
		n.heartbeats.refresh(n) // as a leave does
		dead := labMember(1)
		dead.Status = statusFailed
		n.table.apply(n.now, dead, 0)
	})
	l.n.tick(l.now)
	if l.n.table.failed != 1 || l.n.heartbeats.version != l.n.table.version || len(l.n.heartbeats.watchers) != 2 {
		t.Errorf("%d failed, version %d of %d, %d watchers", l.n.table.failed, l.n.heartbeats.version, l.n.table.version, len(l.n.heartbeats.watchers))
	}
}

func TestHeartbeatPromisesAtFirstAreSpreadOverTheCycle(t *testing.T) {
	n := newNode(nodeConfig{member: labMember(0), reapAfter: time.Hour}, 0)
	for i := 1; i < 5; i++ {
		n.table.apply(n.now, labMember(i), 0).peer().validated = true
	}
	slots := make(map[time.Duration]bool)
	for _, p := range n.tick(0).packets {
		slots[promiseOf(p)/earlyInterval] = true
	}
	if len(slots) != 4 {
		t.Errorf("four watchers are promised %v", slots)
	}
}

// promiseOf is the promise in a heartbeat, 0 in any other datagram.
func promiseOf(p packet) time.Duration {
	var hdr header
	wire.decode(p.data, &hdr)
	return time.Duration(hdr.Promise) * ms
}

// Watchers come, go and restart, the loop is late, and at times the node is stopped: that alone breaks a promise, and
// then all watchers get a new one at once.
func TestHeartbeatsComeWhenTheyWerePromised(t *testing.T) {
	for seed := range baseSeed() + 50 {
		rng := rand.New(rand.NewPCG(seed, 1))
		n := newNode(nodeConfig{member: labMember(0), reapAfter: time.Hour}, 0)
		n.joining.joinedAt = 1
		promised := make(map[lifetime]time.Duration)
		wake, now := time.Duration(0), time.Duration(0)
		for now < time.Minute {
			now = max(now, wake) + time.Duration(rng.Int64N(int64(lateBy)))
			stopped := rng.IntN(100) == 0
			if stopped {
				now += time.Duration(rng.Int64N(int64(5 * time.Second)))
			}
			i := 1 + rng.IntN(9)
			n.step(now, func(n *node) {
				for _, w := range n.heartbeats.watched {
					w.peer().due = n.now + time.Minute
				}
				n.detector.heardFrom(n.now)
				if rng.IntN(4) > 0 {
					return
				}
				m := labMember(i)
				if e := n.table.get(m.Name); e != nil {
					m = e.Member
				}
				if m.Incarnation++; rng.IntN(2) == 0 {
					m.Instance = m.Incarnation
				}
				m.Status = [...]Status{statusAlive, statusAlive, statusSuspect, statusFailed}[rng.IntN(4)]
				n.table.apply(n.now, m, 0).peer().validated = true
			})
			o := n.tick(now)
			wake = o.wake

			next := make(map[lifetime]time.Duration)
			for _, p := range o.packets {
				if promise := promiseOf(p); promise > 0 {
					next[lifetime{p.to.Name, p.to.Instance}] = now + promise
				}
			}
			for _, w := range n.heartbeats.watchers {
				to := lifetime{w.Name, w.Instance}
				at, ok := promised[to]
				if _, sent := next[to]; !sent && ok {
					next[to] = at
				}
				if late := now - next[to]; late > overdueAfter {
					t.Fatalf("seed %d: at %v %s waits for a heartbeat since %v (promised: %v)", seed, now, to.name, late, ok)
				}
			}
			promised = next
		}
	}
}

// Three datagrams that named fifty members at a bystander's address made five
// agents send it ten thousand datagrams.
func TestAddressOfABystanderGetsLittleForAForgedCrowd(t *testing.T) {
	l := newLab(t, 3)
	sent, dialled := 0, 0
	for i := range 50 {
		m := labMember(9)
		m.Name = "m" + string(rune('A'+i))
		l.n.step(l.now, func(n *node) { n.applyAndForward(&update{Member: m}) })
	}
	for end := l.now + 25*time.Second; l.now < end; {
		o := l.n.tick(l.now)
		for _, p := range o.packets {
			if p.to.Addr == labMember(9).Addr {
				sent++
			}
		}
		dialled += len(o.tcpProbes) + len(o.syncs)
		for _, m := range o.links {
			if m.Addr == labMember(9).Addr {
				t.Fatal("a link to a peer that has never answered")
			}
		}
		l.now = max(o.wake, l.now+ms)
		for i := 1; i < 3; i++ {
			beat := l.head(i, header{Kind: msgHeartbeat, Promise: 5000})
			l.n.step(l.now, func(n *node) { n.handleDatagram(labMember(i).Addr, wire.encode(nil, &beat), false) })
		}
	}
	if limit := (amplificationBurst + 25*amplificationRate) / unaskedCost; sent+dialled > limit {
		t.Errorf("%d datagrams and %d dials", sent, dialled)
	}
	t.Logf("%d datagrams and %d dials in 25 s", sent, dialled)
}
