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
	return Member{Name: name, Addr: netip.MustParseAddrPort("10.0.0.1:7946"), Incarnation: inc, Born: inc, Status: s}
}

func TestWhichClaimWins(t *testing.T) {
	base := testMember("a", 10, StatusAlive)
	with := func(f func(*Member)) Member { m := base; f(&m); return m }
	for _, c := range []struct {
		fact string
		m    Member
		wins bool
	}{
		{"the same claim is no news", base, false},
		{"a higher incarnation wins", with(func(m *Member) { m.Incarnation = 11 }), true},
		{"a lower incarnation loses, even if it is worse", with(func(m *Member) { m.Incarnation = 9; m.Status = StatusFailed }), false},
		{"suspect beats alive", with(func(m *Member) { m.Status = StatusSuspect }), true},
		{"failed beats alive", with(func(m *Member) { m.Status = StatusFailed }), true},
		{"left beats alive", with(func(m *Member) { m.Status = StatusLeft }), true},
		{"pruned beats alive", with(func(m *Member) { m.Status = StatusPruned }), true},
		{"of two births in one incarnation the later wins", with(func(m *Member) { m.Born = 11 }), true},
		{"of two addresses in one incarnation the higher wins", with(func(m *Member) { m.Addr = netip.MustParseAddrPort("10.0.0.2:7946") }), true},
	} {
		if got := c.m.supersedes(base); got != c.wins {
			t.Errorf("%s: got %v", c.fact, got)
		}
		if c.wins && base.supersedes(c.m) {
			t.Errorf("%s: both win", c.fact)
		}
	}
	order := []Status{StatusAlive, StatusSuspect, StatusFailed, StatusLeft, StatusPruned}
	for i, worse := range order {
		for _, better := range order[:i] {
			if !testMember("a", 1, worse).supersedes(testMember("a", 1, better)) {
				t.Errorf("%v (%d) must beat %v (%d)", worse, worse, better, better)
			}
		}
	}
}

func TestEventsOfOneMemberAlternate(t *testing.T) {
	restarted := testMember("a", 20, StatusAlive)
	refuted := testMember("a", 11, StatusAlive)
	refuted.Born = 10
	moved := refuted
	moved.Incarnation, moved.Addr = 12, netip.MustParseAddrPort("10.0.0.9:7946")
	for _, c := range []struct {
		fact   string
		claims []Member
		want   string
	}{
		{"alive, suspect and refuted is one join", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusSuspect), refuted}, "join"},
		{"failed then refuted joins again", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusFailed), refuted}, "join failed join"},
		{"a restart nobody noticed is a failure and a join", []Member{testMember("a", 10, StatusAlive), restarted}, "join failed join"},
		{"a restart that died again is one failure", []Member{testMember("a", 10, StatusAlive), testMember("a", 20, StatusFailed)}, "join failed"},
		{"one instance at a new address is an update", []Member{testMember("a", 10, StatusAlive), moved}, "join update"},
		{"failed, then made to leave", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusFailed), testMember("a", 10, StatusLeft)}, "join failed leave"},
		{"failed, then pruned", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusFailed), testMember("a", 10, StatusPruned)}, "join failed leave reap"},
		{"left, then pruned", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusLeft), testMember("a", 10, StatusPruned)}, "join leave reap"},
		{"a stranger that had failed before is not news", []Member{testMember("a", 10, StatusFailed)}, ""},
		{"left and back", []Member{testMember("a", 10, StatusAlive), testMember("a", 10, StatusLeft), restarted}, "join leave join"},
	} {
		tb := newTable()
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
		words = append(words, strings.TrimPrefix(ev.Kind.String(), "member-"))
	}
	return strings.Join(words, " ")
}

func TestALostMemberFailsForMeAndTheGossipedRecordStays(t *testing.T) {
	tb := newTable()
	tb.apply(0, testMember("a", 1, StatusAlive), 0)
	digest := tb.digest
	tb.setLost(tb.get("a"), true)
	tb.setLost(tb.get("a"), false)
	if got := kinds(tb.events); got != "join failed join" {
		t.Errorf("events %q", got)
	}
	if tb.digest != digest || tb.get("a").Status != StatusAlive {
		t.Errorf("the record changed: %+v", tb.get("a").Member)
	}
}

func TestTheDigestTellsTablesApartInAnyOrder(t *testing.T) {
	a, b := newTable(), newTable()
	for i := range 50 {
		a.apply(0, testMember(fmt.Sprint("m", i), 1, StatusAlive), 0)
		b.apply(0, testMember(fmt.Sprint("m", 49-i), 1, StatusAlive), 0)
	}
	if a.digest != b.digest {
		t.Error("the same members in another order have another digest")
	}
	b.apply(0, testMember("m7", 1, StatusSuspect), 0)
	if a.digest != b.digest {
		t.Error("a suspicion changes the digest")
	}
	b.apply(0, testMember("m7", 1, StatusFailed), 0)
	if a.digest == b.digest {
		t.Error("a failure does not change the digest")
	}
	a.apply(0, testMember("m7", 1, StatusFailed), 0)
	if a.digest != b.digest {
		t.Error("the same failure leaves different digests")
	}
	twin := testMember("m8", 1, StatusAlive)
	twin.Addr = netip.MustParseAddrPort("10.9.9.9:7946")
	if b.apply(0, twin, 0); a.digest == b.digest {
		t.Error("another address does not change the digest")
	}
}

func TestADeadMemberIsReapedOnceAndItsClaimDoesNotComeBack(t *testing.T) {
	tb := newTable()
	tb.apply(0, testMember("a", 1, StatusAlive), 0)
	tb.apply(0, testMember("a", 1, StatusFailed), 0)
	tb.reap(time.Hour, 2*time.Hour)
	if len(tb.snapshot()) != 1 {
		t.Fatal("reaped too early")
	}
	tb.reap(2*time.Hour, 2*time.Hour)
	tb.reap(3*time.Hour, 2*time.Hour)
	if tb.apply(3*time.Hour, testMember("a", 1, StatusFailed), 0) || len(tb.snapshot()) != 0 || tb.digest != 0 {
		t.Errorf("came back: %v, digest %x", tb.snapshot(), tb.digest)
	}
	if got := kinds(tb.events); got != "join failed reap" {
		t.Errorf("events %q", got)
	}
	if !tb.apply(3*time.Hour, testMember("a", 2, StatusAlive), 0) {
		t.Error("a new life is refused")
	}
}

func TestEverybodyIsWatchedByAsManyAsTheRingsAllow(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 6, 10, 100} {
		tb := newTable()
		for i := range n {
			tb.apply(0, testMember(fmt.Sprint("web", i), 1, StatusAlive), 0)
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

func TestSuspectsAreWalkedOverButStillWatched(t *testing.T) {
	tb := newTable()
	for i := range 40 {
		tb.apply(0, testMember(fmt.Sprint("web", i), 1, StatusAlive), 0)
	}
	for i := range 12 {
		tb.apply(0, testMember(fmt.Sprint("web", i), 1, StatusSuspect), 0)
	}
	for _, e := range tb.ordered {
		if len(tb.watchers(e)) == 0 {
			t.Errorf("nobody watches %s", e.Name)
		}
		for _, w := range tb.watchers(e) {
			if w.Status == StatusSuspect {
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
	if _, err := MakeTags(map[string]string{"": "x"}); err == nil {
		t.Error("an empty key is taken")
	}
	if _, err := MakeTags(map[string]string{"k": strings.Repeat("x", maxTags)}); err == nil || !strings.Contains(err.Error(), "512") {
		t.Errorf("tags over the limit: %v", err)
	}
	tags, err := MakeTags(map[string]string{"role": "web", "a": "x=y"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a=x=y", "role=web"}, tags.Pairs()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"role": "web", "a": "x=y"}, tags.Map()); diff != "" {
		t.Error(diff)
	}
}
