// detect_test.go: the failure detector of one node, as transcripts, and the
// stories of whole clusters about death, silence and isolation.

package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
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

// ---- stories: failures, stalls, splits and lines ----

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
				if seeds < 9 {
					return // so few have no median that holds
				}
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
