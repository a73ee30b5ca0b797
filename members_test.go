package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// testMember is a member in short: name, incarnation, status.
func testMember(name string, inc uint64, s Status) Member {
	return Member{Name: name, Addr: netip.MustParseAddrPort("10.0.0.1:7946"), Incarnation: inc, Instance: inc, Status: s, Protocol: protocolVersion}
}

func TestClaimThatIsNewerOrWorseSupersedes(t *testing.T) {
	base := testMember("a", 10, statusAlive)
	with := func(f func(*Member)) Member { m := base; f(&m); return m }
	for _, c := range []struct {
		fact string
		m    Member
		wins bool
	}{
		{"the same claim is no news", base, false},
		{"a higher incarnation wins", with(func(m *Member) { m.Incarnation = 11 }), true},
		{"a lower incarnation loses, even if it is worse", with(func(m *Member) { m.Incarnation = 9; m.Status = statusFailed }), false},
		{"suspect beats alive", with(func(m *Member) { m.Status = statusSuspect }), true},
		{"failed beats alive", with(func(m *Member) { m.Status = statusFailed }), true},
		{"left beats alive", with(func(m *Member) { m.Status = statusLeft }), true},
		{"pruned beats alive", with(func(m *Member) { m.Status = statusPruned }), true},
		{"of two births in one incarnation the later wins", with(func(m *Member) { m.Instance = 11 }), true},
	} {
		if got := c.m.supersedes(base); got != c.wins {
			t.Errorf("%s: got %v", c.fact, got)
		}
		if c.wins && base.supersedes(c.m) {
			t.Errorf("%s: both win", c.fact)
		}
	}
	order := []Status{statusAlive, statusSuspect, statusFailed, statusLeft, statusPruned}
	for i, worse := range order {
		for _, better := range order[:i] {
			if !testMember("a", 1, worse).supersedes(testMember("a", 1, better)) {
				t.Errorf("%v (%d) must beat %v (%d)", worse, worse, better, better)
			}
		}
	}
}

func TestEventsOfOneMemberAlternate(t *testing.T) {
	restarted := testMember("a", 20, statusAlive)
	refuted := testMember("a", 11, statusAlive)
	refuted.Instance = 10
	moved := refuted
	moved.Incarnation, moved.Addr = 12, netip.MustParseAddrPort("10.0.0.9:7946")
	for _, c := range []struct {
		fact   string
		claims []Member
		want   string
	}{
		{"alive, suspect and refuted is one join", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusSuspect), refuted}, "join"},
		{"failed then refuted joins again", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusFailed), refuted}, "join failed join"},
		{"a restart nobody noticed is a failure and a join", []Member{testMember("a", 10, statusAlive), restarted}, "join failed join"},
		{"a restart that died again is one failure", []Member{testMember("a", 10, statusAlive), testMember("a", 20, statusFailed)}, "join failed"},
		{"one instance at a new address is an update", []Member{testMember("a", 10, statusAlive), moved}, "join update"},
		{"failed, then made to leave", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusFailed), testMember("a", 10, statusLeft)}, "join failed leave"},
		{"failed, then pruned", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusFailed), testMember("a", 10, statusPruned)}, "join failed leave reap"},
		{"left, then pruned", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusLeft), testMember("a", 10, statusPruned)}, "join leave reap"},
		{"a stranger that had failed before is not news", []Member{testMember("a", 10, statusFailed)}, ""},
		{"left, called failed, and left again is one leave", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusLeft), testMember("a", 20, statusFailed), testMember("a", 20, statusLeft)}, "join leave"},
		{"left and back", []Member{testMember("a", 10, statusAlive), testMember("a", 10, statusLeft), restarted}, "join leave join"},
	} {
		tb := &table{}
		for _, m := range c.claims {
			tb.apply(0, m, 0)
		}
		if diff := cmp.Diff(c.want, kinds(tb.events)); diff != "" {
			t.Errorf("%s: %s", c.fact, diff)
		}
	}
}

func kinds(evs []Event) string {
	var words []string
	for _, ev := range evs {
		words = append(words, strings.TrimPrefix(ev.kind.String(), "member-"))
	}
	return strings.Join(words, " ")
}

func TestIsolationShowsAMemberAsFailedAndLeavesItsRecord(t *testing.T) {
	tb := &table{}
	tb.apply(0, testMember("a", 1, statusAlive), 0)
	digest := tb.digest
	tb.setIsolated(0, tb.get("a"), true)
	tb.setIsolated(0, tb.get("a"), false)
	if got := kinds(tb.events); got != "join failed join" {
		t.Errorf("events %q", got)
	}
	if tb.digest != digest || tb.get("a").Status != statusAlive {
		t.Errorf("the record changed: %+v", tb.get("a").Member)
	}
}

// It may come back once by anybody's word. After that it has to answer.
func TestFlapOfAMemberIsHeldUntilItAnswers(t *testing.T) {
	tb := &table{}
	inc, now := uint64(10), time.Second
	say := func(s Status) {
		m := testMember("a", inc, s)
		m.Instance = 10
		tb.apply(now, m, 0)
		now += time.Second
	}
	come := func() { inc++; say(statusAlive) }
	say(statusAlive)
	say(statusFailed)
	come()
	say(statusFailed)
	come()
	say(statusFailed)
	come()
	e := tb.get("a")
	if got := kinds(tb.events); got != "join failed join failed" || !e.local.damped || e.displayStatus() != statusFailed || e.Status != statusAlive {
		t.Errorf("events %q, held %v, shown %v, record %v", got, e.local.damped, e.displayStatus(), e.Status)
	}
	tb.release(now, e)
	if got := kinds(tb.events); got != "join failed join failed join" || len(tb.damped) > 0 {
		t.Errorf("after it has answered: events %q", got)
	}

	now += flapWindow + flapWait(e.peer().flap.count) + time.Second // it has stayed
	say(statusFailed)
	come()
	if got := kinds(tb.events); got != "join failed join failed join failed join" {
		t.Errorf("after it has stayed alive for long: events %q", got)
	}

	say(statusFailed)
	come()
	restarted := testMember("a", 100, statusAlive)
	tb.apply(now, restarted, 0)
	if e.local.damped || len(tb.damped) > 0 || e.displayStatus() != statusAlive {
		t.Error("another instance is held for what the former one did")
	}
}

func TestDigestTellsTablesApartInAnyOrder(t *testing.T) {
	a, b := &table{}, &table{}
	for i := range 50 {
		a.apply(0, testMember(fmt.Sprint("m", i), 1, statusAlive), 0)
		b.apply(0, testMember(fmt.Sprint("m", 49-i), 1, statusAlive), 0)
	}
	if a.digest != b.digest {
		t.Error("the same members in another order have another digest")
	}
	b.apply(0, testMember("m7", 1, statusSuspect), 0)
	if a.digest != b.digest {
		t.Error("a suspicion changes the digest")
	}
	b.apply(0, testMember("m7", 1, statusFailed), 0)
	if a.digest == b.digest {
		t.Error("a failure does not change the digest")
	}
	a.apply(0, testMember("m7", 1, statusFailed), 0)
	if a.digest != b.digest {
		t.Error("the same failure leaves different digests")
	}
}

func TestReapOfADeadMemberHappensOnceAndItsClaimDoesNotComeBack(t *testing.T) {
	tb := &table{}
	tb.apply(0, testMember("a", 1, statusAlive), 0)
	tb.apply(0, testMember("a", 1, statusFailed), 0)
	tb.reap(time.Hour, 2*time.Hour)
	if len((&node{table: tb}).members("", 100)) != 1 {
		t.Fatal("reaped too early")
	}
	tb.reap(2*time.Hour, 2*time.Hour)
	tb.reap(3*time.Hour, 2*time.Hour)
	if tb.apply(3*time.Hour, testMember("a", 1, statusFailed), 0) != nil || len((&node{table: tb}).members("", 100)) != 0 || tb.digest != 0 {
		t.Errorf("came back: %v, digest %x", (&node{table: tb}).members("", 100), tb.digest)
	}
	if got := kinds(tb.events); got != "join failed reap" {
		t.Errorf("events %q", got)
	}
	if tb.apply(3*time.Hour, testMember("a", 2, statusAlive), 0) == nil {
		t.Error("a new life is refused")
	}
}

func TestInstancesFollowTheClockAndDifferWithinAMillisecond(t *testing.T) {
	const now = 1_700_000_000_000
	if a, b := newInstanceID(now, ^uint64(0)), newInstanceID(now+1, 0); a >= b {
		t.Errorf("a start a millisecond later is not higher: %x, %x", a, b)
	}
	if a, b := newInstanceID(now, 1<<63), newInstanceID(now, 1<<62); a == b {
		t.Error("two starts in one millisecond are the same")
	}
	if newInstanceID(1<<42-1, ^uint64(0)) > 1<<56 {
		t.Error("a start in 2109 is above what is plausible from the beginning")
	}
}

func TestTableGivesThePlacesOfTheOldestDeadToNewcomers(t *testing.T) {
	tb := &table{}
	for i := range maxMembers {
		m := testMember(fmt.Sprintf("m%05d", i), 1, statusAlive)
		tb.apply(0, m, 0)
		if m.Status = statusFailed; i%2 == 0 {
			tb.apply(time.Duration(i), m, 0)
		}
	}
	digest := func() (d uint64) {
		for _, e := range tb.ordered {
			if !e.local.reaped {
				d ^= e.digest()
			}
		}
		return d
	}
	for i := range 3 {
		if tb.apply(0, testMember(fmt.Sprint("new", i), 1, statusAlive), 0) == nil || tb.get(fmt.Sprintf("m%05d", 2*i)) != nil {
			t.Fatalf("newcomer %d has no place, or not that of the one dead for longest", i)
		}
	}
	if len(tb.ordered) != maxMembers || tb.digest != digest() || tb.failed != maxMembers/2-3 {
		t.Errorf("%d members, %d failed, digest %x", len(tb.ordered), tb.failed, tb.digest)
	}
	for _, e := range tb.ordered {
		if e.Status == statusFailed {
			tb.apply(0, testMember(e.Name, 2, statusAlive), 0)
		}
	}
	if tb.apply(0, testMember("late", 1, statusAlive), 0) != nil {
		t.Error("a living member gives way")
	}
}

// Many names in one datagram may be suspects; no walk passes all of them.
func TestRingWalkIsBoundPastRowsOfSuspects(t *testing.T) {
	tb := &table{}
	for i := range 4000 {
		tb.apply(0, testMember(fmt.Sprint("m", i), 1, statusAlive), 0)
		if i > 0 {
			tb.apply(0, testMember(fmt.Sprint("m", i), 1, statusSuspect), 0)
		}
	}
	if steps := len(slices.Collect(tb.neighbours(0, tb.get("m0"), +1))); steps > maxWalk {
		t.Errorf("%d steps", steps)
	}
	if n := len(tb.watched(tb.get("m0"))); n > rings*maxWalk {
		t.Errorf("it watches %d", n)
	}
}

// What one sender can occupy is a share: with times above all others it could push out all that others had sent.
func TestEventBufferGivesNobodyMoreThanItsShare(t *testing.T) {
	var b eventBuffer
	small, big := &eventSource{}, &eventSource{}
	for i := range uint64(100) {
		b.add(update{Name: "small", Number: i + 1}, small, 0)
	}
	for i := range uint64(5 * maxEvents) {
		b.add(update{Name: "big", Number: i + 1}, big, 0)
	}
	if small.kept != 100 || big.kept != maxEvents-100 || len(b.recent) != maxEvents {
		t.Errorf("%d and %d of %d", small.kept, big.kept, len(b.recent))
	}
	b.trim(time.Second)
	if len(b.recent) != keptEvents || b.recent[0].Number != 5*maxEvents-keptEvents+1 || small.kept != 0 || big.kept != keptEvents {
		t.Errorf("%d are kept, from %d on", len(b.recent), b.recent[0].Number)
	}
}

func TestEventSourceTakesAnEventOnce(t *testing.T) {
	tb := &table{}
	e := tb.apply(0, testMember("a", 10, statusAlive), 0)
	s := e.eventSource(10)
	take := func(number uint64, nonce uint32) bool {
		id := eventID{number, nonce}
		if !s.isNew(id) {
			return false
		}
		tb.advance(e, s, max(s.number, number))
		s.remember(id)
		return true
	}
	for i := range uint64(3 * eventWindow) {
		if !take(i+1, 7) || take(i+1, 7) {
			t.Fatalf("event %d", i+1)
		}
	}
	if take(eventWindow, 8) {
		t.Error("what is too old to be told from what was heard is news")
	}
	// A stranger that made up the number in advance cannot take the place of the real event, and not more than a few.
	for nonce := range uint32(10) {
		if got, want := take(3*eventWindow, 10+nonce), nonce < maxVariants-1; got != want {
			t.Errorf("forged event %d: %v", nonce, got)
		}
	}
	tb.skip(e, s, 4*eventWindow)
	if take(4*eventWindow, 1) || !take(4*eventWindow+1, 1) {
		t.Error("what was given up still counts")
	}
	if e.eventSource(9) != nil || e.eventSource(10) != s {
		t.Error("an instance that is not the member's")
	}
}

// What is compared of the events of a former instance is what a table tells of them: members that were there, that missed the
// last ones or the whole instance, and that came later become the same.
func TestEventDigestCoversWhatATableTellsOfTheFormerInstance(t *testing.T) {
	type run struct{ instance, events uint64 }
	hear := func(runs ...run) (*table, *entry) {
		tb := &table{}
		for _, r := range runs {
			e := tb.apply(0, testMember("a", r.instance, statusAlive), 0)
			tb.advance(e, e.eventSource(r.instance), r.events)
		}
		return tb, tb.get("a")
	}
	// Of two agents with one name one refutes the other: its instance counts again, and the later one is the former.
	tb, e := hear(run{10, 8}, run{20, 3})
	claim := testMember("a", 25, statusAlive)
	claim.Instance = 10
	tb.apply(0, claim, 0)
	if e.eventCount() != 8 || e.formerEvents().instance != 20 || !e.addFormer(22) || e.addFormer(26) || e.eventSource(22) == nil || e.eventSource(21) != nil {
		t.Error("an instance that counts again is not known, or the other is not the former one")
	}

	want, _ := hear(run{10, 8}, run{20, 3}, run{30, 0}, run{40, 5})
	for _, runs := range [][]run{
		{{10, 8}, {20, 3}, {40, 5}},
		{{20, 2}, {40, 5}},
		{{10, 8}, {40, 5}},
		{{10, 8}, {30, 0}, {40, 5}},
		{{40, 5}},
	} {
		tb, e := hear(runs...)
		if e.addFormer(40) || e.addFormer(50) {
			t.Error("an instance is its own former one")
		}
		if e.eventSource(20) == nil && !e.addFormer(20) {
			t.Errorf("%v: no room for the former one", runs)
		}
		tb.skip(e, e.eventSource(20), 3)
		if tb.eventsDigest != want.eventsDigest {
			t.Errorf("%v: the digests differ", runs)
		}
		if e.addFormer(10) {
			t.Errorf("%v: an older one took the place of the former one", runs)
		}
		forgotten := *e
		forgotten.local.reaped = true
		tb.change(0, e, forgotten)
		if tb.eventsDigest != 0 || tb.digest != 0 {
			t.Errorf("%v: what is forgotten is in the digest", runs)
		}
	}
}

// Members forget the dead a moment apart. Until all have, their digests differ, and there is nothing to tell.
func TestDigestAgreesWhileTheDeadAreForgotten(t *testing.T) {
	died := func() *table {
		tb := &table{}
		for i, name := range []string{"a", "b", "c", "d"} {
			e := tb.apply(0, testMember(name, 10, statusAlive), 0)
			tb.advance(e, e.eventSource(10), 3)
			tb.apply(time.Duration(i+1)*time.Second, testMember(name, 10, statusFailed), 0)
		}
		return tb
	}
	mine, from, to := died(), 1500*ms, 3500*ms // b and c are being forgotten, a was long ago
	mine.reap(10*time.Second, 8*time.Second)
	for at := range 5 {
		theirs := died()
		theirs.reap(10*time.Second, 10*time.Second-time.Duration(at)*time.Second)
		for _, digest := range []uint64{theirs.digest, theirs.digest ^ theirs.eventsDigest} {
			if got, want := mine.agreesAround(digest, from, to), at >= 1 && at <= 3; got != want {
				t.Errorf("with one that has forgotten %d of 4: %v", at, got)
			}
		}
	}
	theirs := died()
	theirs.reap(10*time.Second, 8*time.Second)
	theirs.apply(0, testMember("e", 10, statusAlive), 0)
	if mine.agreesAround(theirs.digest, from, to) {
		t.Error("news are not told")
	}
}

func TestEventSourceHoldsWhatIsAheadOfItsTurn(t *testing.T) {
	s := &eventSource{number: 10}
	for _, number := range []uint64{14, 12, 12, 13, 11 + eventWindow} {
		s.hold(heardEvent{update: update{Number: number}})
	}
	s.hold(heardEvent{update: update{Number: 13, Nonce: 1}})
	var got []uint64
	for _, h := range s.held {
		got = append(got, h.update.Number)
	}
	if diff := cmp.Diff([]uint64{12, 13, 13, 14}, got); diff != "" {
		t.Error(diff)
	}
	for i := range uint64(2 * eventWindow) {
		s.hold(heardEvent{update: update{Number: 20, Nonce: uint32(i)}})
	}
	if len(s.held) != eventWindow {
		t.Errorf("%d are held", len(s.held))
	}
}

func TestRingGivesEachMemberAllWatchersItAllows(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 6, 10, 100} {
		tb := &table{}
		for i := range n {
			tb.apply(0, testMember(fmt.Sprint("web", i), 1, statusAlive), 0)
		}
		for _, e := range tb.ordered {
			ws := tb.watchers(e)
			if len(ws) != min(n-1, rings) {
				t.Errorf("n=%d: %s has %d watchers", n, e.Name, len(ws))
			}
			for _, w := range ws {
				if !slices.Contains(tb.watched(w), e) {
					t.Errorf("n=%d: %s sends to %s, which does not expect it", n, e.Name, w.Name)
				}
			}
			for _, p := range tb.watched(e) {
				if !slices.Contains(tb.watchers(p), e) {
					t.Errorf("n=%d: %s expects %s, which does not send", n, e.Name, p.Name)
				}
			}
		}
	}
}

func TestRingPassesOverSuspectsButTheyAreStillWatched(t *testing.T) {
	tb := &table{}
	for i := range 40 {
		tb.apply(0, testMember(fmt.Sprint("web", i), 1, statusAlive), 0)
	}
	for i := range 12 {
		tb.apply(0, testMember(fmt.Sprint("web", i), 1, statusSuspect), 0)
	}
	for _, e := range tb.ordered {
		if len(tb.watchers(e)) == 0 {
			t.Errorf("nobody watches %s", e.Name)
		}
		for _, w := range tb.watchers(e) {
			if w.Status == statusSuspect {
				t.Errorf("%s is watched by the suspect %s", e.Name, w.Name)
			}
			if !slices.Contains(tb.watched(w), e) {
				t.Errorf("%s sends to %s, which does not expect it", e.Name, w.Name)
			}
		}
	}
}

func TestNamesAndTagsHaveLimits(t *testing.T) {
	for name, ok := range map[string]bool{
		"web1": true, "köln-1": true, strings.Repeat("x", maxName): true,
		"": false, "a b": false, "a\tb": false, "a\x1b[31m": false, "a\u202eb": false, "\xff": false, strings.Repeat("x", maxName+1): false,
	} {
		if err := validName(name); (err == nil) != ok {
			t.Errorf("validName(%q) = %v", name, err)
		}
	}
	if _, err := makeTags(map[string]string{"": "x"}); err == nil {
		t.Error("an empty key is taken")
	}
	if _, err := makeTags(map[string]string{"k": strings.Repeat("x", maxTags)}); err == nil || !strings.Contains(err.Error(), "512") {
		t.Errorf("tags over the limit: %v", err)
	}
	tags, err := makeTags(map[string]string{"role": "web", "a": "x=y"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a=x=y", "role=web"}, splitNUL(tags)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"role": "web", "a": "x=y"}, tags.asMap()); diff != "" {
		t.Error(diff)
	}
}
