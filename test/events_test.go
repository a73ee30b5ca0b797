package test

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var userEventLine = regexp.MustCompile(`\[INFO\] user-event: (\S+) \(from (\S+),`)

// eventsFrom is the user events of name that the agent has logged, in order.
func (a *agent) eventsFrom(name string) (events []string) {
	for _, m := range userEventLine.FindAllStringSubmatch(a.stderr.String(), -1) {
		if m[2] == name {
			events = append(events, m[1])
		}
	}
	return events
}

// sendEvents sends count events of size bytes by a shell that runs jobs commands at a time; it fails where one does.
func (a *agent) sendEvents(count, size, jobs int) {
	a.t.Helper()
	script := fmt.Sprintf("seq 1 %d | xargs -P %d -I @ %s event -rpc-addr %s -coalesce=false e@ %s",
		count, jobs, asker, a.rpc, strings.Repeat("x", size))
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		a.t.Errorf("%v: %.2000s", err, out)
	}
}

// "hamlet event register" right after the start said that it was dispatched, and nobody ever heard it.
func TestEventSentBeforeTheJoinIsDeliveredAtTheJoin(t *testing.T) {
	t.Parallel()
	seed := freePort(t)
	a := startAgent(t, "-node", "a", "-join", seed)
	b := startAgent(t, "-node", "b", "-join", seed)
	for i := range 3 {
		if _, errs, code := a.run("event", "-coalesce=false", fmt.Sprint("register", i)); code != 0 {
			t.Fatalf("exit %d, %s", code, errs)
		}
	}
	time.Sleep(300 * time.Millisecond)
	c := startAgent(t, "-node", "c", "-bind", seed)
	alone := startAgent(t, "-node", "alone")
	if _, errs, code := alone.run("event", "-coalesce=false", "told-to-join"); code != 0 {
		t.Fatalf("exit %d, %s", code, errs)
	}
	want := []string{"register0", "register1", "register2"}
	for _, name := range []string{"a", "b"} {
		c.waitLine(memberLine("member-join", name, "127.0.0.1"))
	}
	// Those that come after a do not hear what was before their time.
	log := c.stderr.String()
	wantAtB := want
	hearers := []*agent{a, b, c}
	if strings.Index(log, "member-join: a ") < strings.Index(log, "member-join: b ") {
		wantAtB = nil
		hearers = []*agent{a, c}
	}
	for _, x := range hearers {
		eventually(t, x.name+" hears what was sent before the join", func() bool { return slices.Equal(x.eventsFrom("a"), want) })
	}
	if _, errs, code := alone.run("join", c.advertised); code != 0 {
		t.Fatalf("exit %d, %s", code, errs)
	}
	for _, x := range []*agent{a, b, c} {
		eventually(t, x.name+" hears of the node that was told to join", func() bool { return len(x.eventsFrom("alone")) == 1 })
	}
	late := startAgent(t, "-node", "late", "-join", c.advertised)
	late.waitStatus("alone", "alive")
	a.run("event", "after")
	for _, x := range []*agent{a, b, c, late, alone} {
		eventually(t, x.name+" hears what is sent afterwards", func() bool { return slices.Contains(x.eventsFrom("a"), "after") })
	}
	if got := slices.Concat(alone.eventsFrom("a"), late.eventsFrom("a"), late.eventsFrom("alone")); len(got) != 2 {
		t.Errorf("those that came later hear of what was before: %q", got)
	}
	for _, x := range []*agent{a, b, c} {
		heard := want
		if x == b {
			heard = wantAtB
		}
		if got := x.eventsFrom("a"); !slices.Equal(got, append(slices.Clone(heard), "after")) {
			t.Errorf("%s hears %q", x.name, got)
		}
	}
}

func TestEventsThatWereAcceptedArriveInOrder(t *testing.T) {
	t.Parallel()
	var names []string
	for i := range envInt("EVENTS_N", 5) {
		names = append(names, fmt.Sprint("n", i))
	}
	as := startCluster(t, names...)
	count := envInt("EVENTS", 300)
	began := time.Now()
	as[1].sendEvents(count, envInt("EVENTS_SIZE", 900), 8)
	accepted := time.Since(began)
	for _, a := range as {
		eventually(t, a.name+" has all", func() bool { return len(a.eventsFrom("n1")) >= count })
	}
	t.Logf("accepted %.0f events a second; all had all %v after the last", float64(count)/accepted.Seconds(), time.Since(began)-accepted)
	want := as[1].eventsFrom("n1")
	if slices.Sort(want); len(slices.Compact(want)) != count {
		t.Errorf("%d different events", len(slices.Compact(want)))
	}
	for _, a := range as {
		if got := a.eventsFrom("n1"); !slices.Equal(got, as[1].eventsFrom("n1")) {
			t.Errorf("%s heard %d, and in another order than they were sent", a.name, len(got))
		}
	}
}
