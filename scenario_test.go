// scenario_test.go: what a cluster must do, told as stories in virtual time on
// the simulator of sim_test.go.
//
// The decisions of the protocol, and the story that goes wrong without each:
//
//	small clusters watch each other .......... TestInASmallClusterEverybodyWatchesEverybody
//	rings heal at once, suspects are skipped . TestTheRestNoticesThatMostHostsAreLost
//	predecessors come from the table ......... TestTheRestNoticesThatMostHostsAreLost
//	the hello carries the incarnation ........ TestARestartedAgentThatJoinsNobodyHasFailed
//	dial again at 150 and 300 ms ............. TestAStalledMemberIsNotCalledDead (20 % loss)
//	late votes count ......................... TestASlowNetworkIsNotADeadOne
//	the end of a link is only evidence ....... TestAnIdleClusterStaysQuiet, and most others
//	two observers ............................ TestALonelyNodeBlamesOnlyItself
//	time to contradict ....................... TestAShortBlackoutFailsNobody
//	accepted but silent is not dead .......... TestAStalledMemberIsNotCalledDead
//	deadlines run on awake time .............. TestMembersThatSleepTogetherFailNobody
//	queues are drained before judging ........ TestAnAccuserThatIsStoppedAgainAndAgainAccusesNobody
//	marks of a lonely node stay with it ...... TestALonelyNodeBlamesOnlyItself
//	failed in a table is only doubted ........ TestASplitHeals
//	the dead are told, and retried ........... TestASplitHeals
//	digests start a repair ................... TestUserEventsArriveOnceDespiteLoss

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

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
			if !all(s.procs, v.name, StatusFailed) {
				return false
			}
		}
		return true
	}
}

func TestAKilledMemberIsNoticedByAll(t *testing.T) {
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
			ts := s.times(EventFailed, v.name, from)
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

func TestALostHostIsNoticedByAll(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		from := s.now
		s.loseHost(v)
		s.until(20*time.Second, 10*ms, s.allFailed([]*proc{v}))
		ts := s.times(EventFailed, v.name, from)
		t.Logf("first %v, all %v", percentile(ts, 0), percentile(ts, 1))
		if len(ts) != len(ps)-1 {
			t.Fatalf("%d of %d noticed", len(ts), len(ps)-1)
		}
		atMost(t, "noticing", percentile(ts, 1), 3*time.Second+time.Duration(s.loss*float64(25*time.Second)))
	})
}

func TestALonelyNodeBlamesOnlyItself(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		s.excuse = func(o, q *proc) bool { return o == v || q == v }
		v.host.up = false
		s.within(5*time.Second, "it says so of all others", func() bool {
			for _, p := range others(ps, v) {
				if v.shows(p.name) != StatusFailed {
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
			if s.loss == 0 && len(ps) > 2 && p.n.self.Incarnation != p.n.self.Born {
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

func TestAStalledMemberIsNotCalledDead(t *testing.T) {
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
func TestASuspendedMachineBlamesNobody(t *testing.T) {
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
func TestMembersThatSleepTogetherFailNobody(t *testing.T) {
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

func TestAShortBlackoutFailsNobody(t *testing.T) {
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

func TestAMemberThatStallsForLongFailsAndComesBack(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = func(o, q *proc) bool { return q == ps[1] }
		ps[1].stop()
		s.run(12 * time.Second)
		if s.loss > .1 {
			s.run(12 * time.Second) // who misses the flood waits for its own ten seconds
		}
		if !all(others(ps, ps[1]), ps[1].name, StatusFailed) {
			t.Error("not everybody has it as failed")
		}
		s.excuse = nil
		ps[1].cont()
		s.within(s.healing(), "all alive again", s.agree)
		s.run(20 * time.Second)
	})
}

func TestAnIdleClusterStaysQuiet(t *testing.T) {
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
func TestTheRestNoticesThatMostHostsAreLost(t *testing.T) {
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

func TestMassFailureIsNoticedByAll(t *testing.T) {
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

func TestInASmallClusterEverybodyWatchesEverybody(t *testing.T) {
	for n := 2; n <= rings+1; n++ {
		for i := range 20 {
			s := newSim(t, seedFor(fmt.Sprint(t.Name(), n, i)))
			for range 100 * i { // other names, other places on the rings
				s.host()
			}
			for _, p := range s.cluster(n) {
				if len(p.n.watchers) != n-1 || len(p.n.preds) != n-1 {
					t.Errorf("of %d, %s has %d watchers and watches %d", n, p.name, len(p.n.watchers), len(p.n.preds))
				}
			}
			s.check()
		}
	}
}

// Helpers answer after the prober has concluded; their votes must still count.
func TestASlowNetworkIsNotADeadOne(t *testing.T) {
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

// A thousand live through all of it in one run, since starting them is dear.
func TestAThousandMembers(t *testing.T) {
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

func TestASplitHeals(t *testing.T) {
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
							if apart(p, q) && p.shows(q.name) != StatusFailed {
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

func TestOneWayLossBetweenAPairFailsNobody(t *testing.T) {
	cases(t, []int{3, 5, 10, 100}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		a := ps[0]
		b := s.byBirth[birth{a.n.watchers[0].e.Name, a.n.watchers[0].e.Born}]
		s.oneWay[[2]int{a.host.i, b.host.i}] = true
		s.run(40 * time.Second)
		delete(s.oneWay, [2]int{a.host.i, b.host.i})
		s.oneWay[[2]int{b.host.i, a.host.i}] = true
		s.run(40 * time.Second)
	})
}

func TestAnAccuserThatIsStoppedAgainAndAgainAccusesNobody(t *testing.T) {
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

func TestAHundredJoinersConvergeAtOnce(t *testing.T) {
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
				if p.fatal != nil || p.n.t.alive() != 101 {
					t.Errorf("%s: %v, %d members", p.name, p.fatal, p.n.t.alive())
				}
			}
			s.check()
		})
	}
}

func TestStartOrderDoesNotMatter(t *testing.T) {
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

func TestASeedThatIsOnlyItselfSaysSoOnce(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	h := s.host()
	p := s.start(h, "seed0", h)
	s.run(time.Hour)
	if len(p.logs) != 1 || !strings.Contains(p.logs[0], "[INFO] no seed answers but this node itself") {
		t.Errorf("it logs %q", p.logs)
	}
}

func TestRetryMaxEndsOnlyWhoHasNeverJoined(t *testing.T) {
	s := newSim(t, seedFor(t.Name()))
	seed := s.start(s.host(), "seed")
	nowhere := s.host()
	lonely := s.start(s.host(), "lonely", nowhere)
	lonely.n.RetryMax = 5
	var ps []*proc
	for i := range 5 {
		ps = append(ps, s.start(s.host(), fmt.Sprint("m", i), seed.host))
		ps[i].n.RetryMax = 5
	}
	s.run(20 * time.Second)
	if lonely.fatal == nil || !strings.Contains(lonely.fatal.Error(), nowhere.addr.String()) {
		t.Errorf("who has joined nobody in 5 rounds ends with %v", lonely.fatal)
	}
	s.crash(seed)
	s.run(5 * time.Minute)
	for _, p := range ps {
		if p.fatal != nil {
			t.Errorf("%s ends since its seed has died: %v", p.name, p.fatal)
		}
	}
}

func TestAMemberThatTakesNoTCPCostsLittleAndIsNamed(t *testing.T) {
	cases(t, []int{3, 5, 20}, []float64{0}, func(t *testing.T, s *sim, ps []*proc) {
		s.run(time.Minute)
		idle := s.packets
		odd := s.start(s.host(), "odd", ps[0].host)
		odd.host.noTCP = true
		ps = append(ps, odd)
		s.run(time.Minute)
		s.packets = 0
		s.run(time.Minute)
		if s.packets > 2*idle {
			t.Errorf("%d packets a minute, %d before", s.packets, idle)
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

func TestUserEventsArriveOnceDespiteLoss(t *testing.T) {
	cases(t, []int{2, 3, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		var spread []time.Duration
		const events = 20
		for i := range events {
			from := s.now
			name := fmt.Sprint("deploy", i)
			ps[i*7%len(ps)].do(func(n *node) {
				if err := n.userEvent(s.now, name, []byte("payload"), false); err != nil {
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

func TestAStormOfUserEventsArrivesWhole(t *testing.T) {
	t.Parallel()
	cases(t, []int{10, 50}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		for i := range 100 {
			ps[i%len(ps)].do(func(n *node) { n.userEvent(s.now, fmt.Sprint("e", i), make([]byte, 900), false) })
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

func TestALeaverHasLeftAndNotFailed(t *testing.T) {
	cases(t, []int{2, 3, 5, 10, 100}, []float64{0, .05, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)-1]
		from := s.now
		v.do(func(n *node) { n.startLeave(s.now) })
		s.within(1200*ms, "the leaver is done", func() bool { return v.left })
		s.within(5*time.Second, "all show it as left", func() bool { return all(ps, v.name, StatusLeft) })
		s.run(20 * time.Second)
		if failed := s.times(EventFailed, v.name, from); len(failed) > 0 {
			t.Errorf("%d member-failed", len(failed))
		}
		if left := s.times(EventLeave, v.name, from); len(left) != len(ps)-1 {
			t.Errorf("%d member-leave", len(left))
		}
		w := s.start(v.host, v.name, ps[0].host)
		s.within(5*time.Second, "back again", s.agree)
		_ = w
	})
}

// story checks that all of ps saw just these events about name since from.
func (s *sim) story(ps []*proc, name string, from time.Duration, want ...EventKind) {
	s.tb.Helper()
	got := make(map[*proc][]EventKind)
	for _, o := range s.seen {
		if o.Member.Name == name && o.at >= from {
			got[o.by] = append(got[o.by], o.Kind)
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

func TestARestartIsFailedThenJoin(t *testing.T) {
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
				s.story(others(ps, v), v.name, from, EventFailed, EventJoin)
				if w.fatal != nil {
					t.Error(w.fatal)
				}
			})
		})
	}
}

// It knows nobody, but those who knew it go on asking for it.
func TestARestartedAgentThatJoinsNobodyIsTakenBack(t *testing.T) {
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
func TestARestartedAgentThatJoinsNobodyHasFailed(t *testing.T) {
	cases(t, []int{2, 3, 10, 100}, []float64{0, .2}, func(t *testing.T, s *sim, ps []*proc) {
		v := ps[len(ps)/2]
		from := s.now
		s.crash(v)
		s.run(ms)
		s.start(v.host, v.name)
		s.within(5*time.Second, "all say that it has failed", func() bool {
			return len(s.times(EventFailed, v.name, from)) >= len(ps)-1
		})
	})
}

func TestANameMovesToANewAddressWhenTheOldHostIsGone(t *testing.T) {
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
				s.story(others(ps, v), v.name, from, EventFailed, EventJoin)
				if w.fatal != nil {
					t.Error(w.fatal)
				}
				// the old host comes back to life: its instance is gone, nothing flips
			})
		})
	}
}

func TestANewcomerWhoseNameIsTakenGivesUp(t *testing.T) {
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

func TestOfTwinsBornInOneMillisecondOneGivesWay(t *testing.T) {
	cases(t, []int{2, 3, 10, 40}, []float64{0, .05}, func(t *testing.T, s *sim, ps []*proc) {
		s.excuse = func(o, q *proc) bool { return q.name == "twin" }
		a := s.start(s.host(), "twin", ps[0].host)
		b := s.start(s.host(), "twin", ps[len(ps)-1].host)
		s.within(4*time.Second, "one gives up", func() bool { return (a.fatal == nil) != (b.fatal == nil) })
		s.run(20 * time.Second)
		if a.fatal != nil && b.fatal != nil || !all(ps, "twin", StatusAlive) {
			t.Errorf("none is left: %v; %v", a.fatal, b.fatal)
		}
	})
}

func TestAMemberIsNotDisturbedByANamesakeThatOthersJoin(t *testing.T) {
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
					young.do(func(n *node) { n.startLeave(s.now) })
				}
				s.run(5 * time.Second)
				from := s.now
				ps[0].do(func(n *node) { n.join(s.now, 1, []netip.AddrPort{to.host.addr}, nil) })
				switch how {
				case "through another":
					s.within(5*time.Second, "the younger gives up", func() bool { return young.fatal != nil })
					fallthrough
				case "failed", "left":
					s.within(10*time.Second, "one cluster", s.agree)
				case "itself":
					s.within(5*time.Second, "the join ends", func() bool { return len(ps[0].joins) > 0 })
					if j := ps[0].joins[0]; j.ok > 0 || !strings.Contains(strings.Join(j.errs, ""), "is taken: the member at "+holder.host.addr.String()) {
						t.Errorf("the join ended with %+v", j)
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

func TestOfANameOnBothSidesOfASplitTheYoungerGivesWay(t *testing.T) {
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
		if !all(b, older.name, StatusAlive) {
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

func TestADeadMembersAddressGoesToANewName(t *testing.T) {
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
				s.story(others(ps, v), v.name, from, EventFailed)
				s.story(others(ps, v), "newname", from, EventJoin)
			})
		})
	}
}

func TestAClockSetBackDoesNotKeepAMemberOut(t *testing.T) {
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
				s.story(others(ps, v), v.name, from, EventFailed, EventJoin)
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
					if err := n.forceLeave(s.now, ps[len(ps)-1].name, prune); err == nil {
						t.Error("a member that is alive was made to leave")
					}
					if err := n.forceLeave(s.now, v.name, prune); err != nil {
						t.Error(err)
					}
				})
				want := StatusLeft
				if prune {
					want = 0
				}
				s.within(5*time.Second, "everywhere", func() bool { return all(ps, v.name, want) })
				s.run(time.Minute)
				if !all(ps, v.name, want) {
					t.Error("it came back")
				}
				if prune {
					s.story(others(ps, v), v.name, from, EventLeave, EventReap)
				} else {
					s.story(others(ps, v), v.name, from, EventLeave)
				}
			})
		})
	}
}

// Until all have forgotten a member their digests differ, and every heartbeat
// would ask for an exchange of tables that can change nothing.
func TestForgettingAMemberCostsNoTraffic(t *testing.T) {
	cases(t, []int{3, 30, 100}, []float64{0}, func(t *testing.T, s *sim, ps []*proc) {
		for _, p := range ps {
			p.n.ReapAfter = 10 * time.Minute
			p.n.reapAt = p.n.now + time.Duration(s.rng.Int64N(int64(p.n.reapEvery())))
		}
		s.crash(ps[len(ps)/2])
		s.run(9 * time.Minute)
		s.frames = 0
		s.run(2 * time.Minute)
		t.Logf("%d frames", s.frames)
		if s.frames > 4*len(ps) {
			t.Errorf("%d frames", s.frames)
		}
		for _, p := range s.running() {
			if len(p.n.members()) != len(ps)-1 {
				t.Errorf("%s shows %d members", p.name, len(p.n.members()))
			}
		}
	})
}

func TestAFailedMemberIsForgottenOnce(t *testing.T) {
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
				s.story(others(ps, v), v.name, from, EventFailed, EventReap)
				s.story([]*proc{late}, v.name, from, EventReap)
				if late.shows(v.name) != 0 || late.n.t.get(v.name) != nil {
					t.Error("the late one still has it")
				}
				s.check()
			})
		}
	}
}
