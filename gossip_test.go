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

// A transcript is a conversation with one node: what it is told, and below,
// indented, all that it puts out. Whole clusters are in scenario_test.go.

type lab struct {
	t    *testing.T
	n    *node
	c    *codec
	now  time.Duration
	text strings.Builder
}

// labMember is member number i: a, b, c ..., all born at 10.
func labMember(i int) Member {
	m := testMember(string(rune('a'+i)), 10, StatusAlive)
	m.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)}), 7946)
	return m
}

// newLab makes node a, which knows of count-1 others, in silence.
func newLab(t *testing.T, count int) *lab {
	c := newCodec()
	l := &lab{t: t, c: c, n: newNode(nodeConfig{Self: labMember(0), ReapAfter: time.Hour, Codec: c}, 0)}
	for i := 1; i < count; i++ {
		l.n.t.apply(l.n.now, labMember(i), 0)
	}
	l.n.everJoined = true
	l.n.tick(0)
	l.n.take()
	for _, s := range l.n.streams { // the watch links stand
		s.open, s.by = true, 0
	}
	return l
}

// after lets d pass, in steps as the loop would make them.
func (l *lab) after(d time.Duration) {
	fmt.Fprintf(&l.text, "%v pass\n", d)
	for end := l.now + d; ; {
		l.n.tick(l.now)
		o := l.n.take()
		l.print(o)
		if o.wake >= end {
			l.now = end
			return
		}
		l.now = max(o.wake, l.now+time.Microsecond)
	}
}

// udp hands in a datagram of member from, with updates.
func (l *lab) udp(from int, h head, updates ...update) {
	m := labMember(from)
	if h.From == "" {
		h.From, h.Incarnation = m.Name, m.Incarnation
	}
	b := l.c.head(nil, &h)
	for _, u := range updates {
		b = l.c.update(b, &u)
	}
	fmt.Fprintf(&l.text, "%s says %s\n", h.From, l.say(b))
	if err := l.n.datagram(l.now, m.Addr, b); err != nil {
		fmt.Fprintf(&l.text, "  error: %v\n", err)
	}
	l.n.tick(l.now)
	l.print(l.n.take())
}

// dials tells the node how its dials to a member end.
func (l *lab) dials(to int, err error) {
	fmt.Fprintf(&l.text, "dials to %s: %v\n", labMember(to).Name, err)
	for _, s := range l.n.streams {
		if s.addr == labMember(to).Addr && s.want == kLook && !s.open {
			l.n.dialed(l.now, s.id, err)
			break
		}
	}
	l.n.tick(l.now)
	l.print(l.n.take())
}

// breaks ends the watch link with a member, as its death would.
func (l *lab) breaks(with int) {
	fmt.Fprintf(&l.text, "link to %s breaks\n", labMember(with).Name)
	for _, s := range l.n.streams {
		if s.want == kWatch && s.name == labMember(with).Name {
			l.n.closed(l.now, s.id, fmt.Errorf("gone"))
			break
		}
	}
	l.n.tick(l.now)
	l.print(l.n.take())
}

var kindWords = map[kind]string{kHeartbeat: "heartbeat", kPing: "ping", kAck: "ack", kCheck: "check", kVote: "vote", kFlood: "flood"}
var statusWords = map[Status]string{StatusAlive: "alive", StatusSuspect: "suspect", StatusFailed: "failed", StatusLeft: "left"}

// say renders a datagram.
func (l *lab) say(b []byte) string {
	h, rest, err := l.c.readHead(b)
	if err != nil {
		l.t.Fatal(err)
	}
	s := kindWords[h.Kind]
	if h.Target != "" {
		s += " " + h.Target
	}
	if h.Kind == kVote {
		s += " " + []string{"-", "unreachable", "refused", "silent", "alive"}[h.Verdict]
	}
	for len(rest) > 0 {
		var u update
		if u, rest, err = l.c.readUpdate(rest); err != nil {
			l.t.Fatal(err)
		}
		if u.Event != "" {
			s += fmt.Sprintf(" [event %s %d]", u.Event, u.LTime)
		} else {
			s += fmt.Sprintf(" [%s %s %d]", u.Name, statusWords[u.Status], u.Incarnation)
		}
	}
	return s
}

// print writes the outputs that matter: heartbeats and watch links are silence.
func (l *lab) print(o outputs) {
	for _, p := range o.packets {
		if s := l.say(p.data); s != "heartbeat" {
			fmt.Fprintf(&l.text, "  to %s: %s\n", p.name, s)
		}
	}
	for _, op := range o.streams {
		if s := l.n.stream(op.id); op.op == opDial && s != nil && s.want != kWatch {
			fmt.Fprintf(&l.text, "  dials %s\n", op.to.Addr())
		}
	}
	for _, ev := range o.events {
		fmt.Fprintf(&l.text, "  event %v %s\n", ev.Kind, ev.Member.Name+ev.Name)
	}
	for _, s := range o.logs {
		if strings.HasPrefix(s, "[TRACE]") {
			continue
		}
		fmt.Fprintf(&l.text, "  log %s\n", s)
	}
}

func (l *lab) want(s string) {
	l.t.Helper()
	want := strings.TrimPrefix(strings.ReplaceAll(s, "\n\t\t", "\n"), "\n")
	if diff := cmp.Diff(strings.TrimRight(want, "\n\t"), strings.TrimRight(l.text.String(), "\n")); diff != "" {
		l.t.Errorf("transcript (-want +got):\n%s", diff)
	}
	l.text.Reset()
}

func TestAKilledProcessFailsWhenTwoWereRefused(t *testing.T) {
	l := newLab(t, 3)
	l.breaks(1)
	l.dials(1, errRefused)
	l.udp(2, head{Kind: kVote, Seq: l.n.probes[0].seq, Target: "b", Verdict: vRefused})
	l.want(`
		link to b breaks
		  to b: ping b
		  dials 10.0.0.2
		dials to b: connection refused
		  to b: ping b
		  to c: check b
		c says vote b refused
		  to c: flood [b failed 10]
		  event member-failed b
	`)
}

func TestARefusedDialIsNoVerdictWhenSomebodyReachesIt(t *testing.T) {
	l := newLab(t, 3)
	l.breaks(1)
	l.dials(1, errRefused)
	l.udp(2, head{Kind: kVote, Seq: l.n.probes[0].seq, Target: "b", Verdict: vAlive})
	l.text.Reset()
	l.after(700 * ms)
	if e := l.n.t.get("b"); e.Status != StatusAlive {
		t.Errorf("b is %v\n%s", e.Status, l.text.String())
	}
}

func TestASuspectRefutesToItsAccuserDirectly(t *testing.T) {
	l := newLab(t, 3)
	me := memberUpdate(labMember(0))
	me.Status, me.By = StatusSuspect, "c"
	l.udp(1, head{Kind: kFlood}, me)
	l.want(`
		b says flood [a suspect 10]
		  to b: flood [a alive 11]
		  to c: flood [a alive 11]
		  to b: flood [a alive 11]
		  to c: flood [a alive 11]
		  log [DEBUG] refuting what is said of this node, incarnation 11
	`)
}

func TestWhoeverIsThoughtDeadIsToldWhenItSpeaks(t *testing.T) {
	l := newLab(t, 3)
	dead := memberUpdate(labMember(1))
	dead.Status = StatusFailed
	l.udp(2, head{Kind: kFlood}, dead)
	l.udp(1, head{Kind: kHeartbeat, Seq: 1, Promise: 1000})
	again := memberUpdate(labMember(1))
	again.Incarnation, again.Raised = 11, 1
	l.udp(1, head{Kind: kFlood}, again)
	l.want(`
		c says flood [b failed 10]
		  to c: flood [b failed 10]
		  event member-failed b
		b says heartbeat
		  to b: flood [b failed 10]
		b says flood [b alive 11]
		  event member-join b
	`)
}

func TestAPingForAFormerOwnerOfTheAddressIsNotAnswered(t *testing.T) {
	l := newLab(t, 2)
	l.udp(1, head{Kind: kPing, Seq: 5, Target: "z"})
	l.udp(1, head{Kind: kPing, Seq: 6, Target: "a"})
	l.want(`
		b says ping z
		b says ping a
		  to b: ack
	`)
}

func TestAUserEventRunsOnceHoweverOftenItArrives(t *testing.T) {
	l := newLab(t, 2)
	ev := update{Name: "b", Event: "deploy", Payload: []byte("1"), LTime: 7}
	l.udp(1, head{Kind: kFlood}, ev)
	l.udp(1, head{Kind: kFlood}, ev)
	if err := l.n.userEvent(l.now, "reply", nil, true); err != nil {
		t.Fatal(err)
	}
	l.after(10 * ms)
	l.want(`
		b says flood [event deploy 7]
		  to b: flood [event deploy 7]
		  event user deploy
		b says flood [event deploy 7]
		10ms pass
		  event user reply
		  to b: flood [event reply 8]
	`)
}

func TestARecordedHeartbeatDoesNotKeepTheDeadAlive(t *testing.T) {
	l := newLab(t, 2)
	beat := head{Kind: kHeartbeat, Seq: 3, Promise: 500}
	l.udp(1, beat)
	due := l.n.peers["b"].due
	l.after(300 * ms)
	l.udp(1, beat)
	if got := l.n.peers["b"].due; got != due {
		t.Errorf("due moved from %v to %v", due, got)
	}
}

func TestACheckIsOnlyMadeAtTheAddressOfAKnownMember(t *testing.T) {
	l := newLab(t, 3)
	l.udp(1, head{Kind: kCheck, Seq: 1, Target: "stranger"})
	l.udp(1, head{Kind: kCheck, Seq: 2, Target: "c"})
	l.want(`
		b says check stranger
		b says check c
		  to c: ping c
		  dials 10.0.0.3
	`)
}

func TestWhoeverWasStoppedHearsFirstAndJudgesThen(t *testing.T) {
	l := newLab(t, 2)
	l.udp(1, head{Kind: kHeartbeat, Seq: 1, Promise: 500})
	l.text.Reset()
	l.now += 8 * time.Second
	if err := l.n.datagram(l.now, labMember(1).Addr, l.c.head(nil, &head{Kind: kHeartbeat, From: "b", Incarnation: 10, Seq: 2, Promise: 500})); err != nil {
		t.Fatal(err)
	}
	l.after(400 * ms)
	if strings.Contains(l.text.String(), "ping") {
		t.Errorf("it doubts b:\n%s", l.text.String())
	}
}

// A machine on two networks dials members on both; what it advertises must not
// flap for that.
func TestTheFirstSeedThatAnswersDecidesTheAddress(t *testing.T) {
	l := newLab(t, 1)
	n, own := l.n, labMember(0).Addr.Addr()
	n.everJoined = false
	dialFrom := func(want kind, ip string, gone bool) {
		if want == 0 {
			s := n.streams[len(n.streams)-1]
			s.open = true
			if err := n.welcomedExchange(s, head{From: "b", Incarnation: 10, Digest: 1}); err != nil {
				t.Error(err)
			}
			return
		}
		s := n.dial(labMember(1).Addr, want, "b")
		if want == kExchange {
			s.attempt = &attempt{open: 9}
		}
		n.moved(l.now, s.id, netip.MustParseAddr(ip), gone, 20)
	}
	n.everJoined = true // through others, who know the address
	if dialFrom(kExchange, "10.66.0.1", false); n.self.Addr.Addr() != own {
		t.Errorf("after it has been joined it moves to %s", n.self.Addr)
	}
	n.everJoined = false
	for _, tt := range []struct {
		want kind
		from string
		gone bool
		is   string
	}{
		{kWatch, "10.88.0.1", false, own.String()},
		{kExchange, "10.77.0.1", false, "10.77.0.1"},
		{0, "", false, "10.77.0.1"}, // the seed answers
		{kExchange, "10.88.0.1", false, "10.77.0.1"},
		{kLook, "10.88.0.1", false, "10.77.0.1"},
		{kWatch, "10.99.0.1", true, "10.99.0.1"},
	} {
		if dialFrom(tt.want, tt.from, tt.gone); n.self.Addr.Addr().String() != tt.is {
			t.Errorf("after a dial from %s it advertises %s, want %s", tt.from, n.self.Addr, tt.is)
		}
	}
}

// An IPv6 zone is text of any kind and length, and goes where addresses go: to
// handlers, to the terminal, into datagrams.
func TestAnAddressBringsNoTextAlong(t *testing.T) {
	for zone, ok := range map[string]bool{
		"": true, "eth0": true, "a\tb": false, "a\nevil\t6.6.6.6": false, "\x1b]0;pwn\a": false, strings.Repeat("z", 200): false,
	} {
		m := labMember(1)
		m.Addr = netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone(zone), 7946)
		u := memberUpdate(m)
		if _, err := u.member(); (err == nil) != ok {
			t.Errorf("zone %.20q: %v", zone, err)
		}
	}
}

// Whoever opens many streams and tells of members that nobody has must not fill
// the memory: what a stream has told is remembered while it is open.
func TestTablesOfManyStreamsAreBoundedTogether(t *testing.T) {
	l := newLab(t, 2)
	frame := func(id connID, h head, us ...update) error {
		b := l.c.head(nil, &h)
		for _, u := range us {
			b = l.c.update(b, &u)
		}
		return l.n.frame(l.now, id, b)
	}
	told := 0
	for id := connID(-1); id > -100; id-- {
		if err := frame(id, head{Kind: kExchange, From: "q", Incarnation: 10, Nonce: 1, Digest: l.n.digest()}); err != nil {
			t.Fatal(err)
		}
		for k := range maxMembers / 64 {
			var us []update
			for i := range 64 {
				m := labMember(1)
				m.Name, m.Status = fmt.Sprintf("%d-%d", id, 64*k+i), StatusLeft
				us = append(us, memberUpdate(m))
			}
			if err := frame(id, head{Kind: kTable, From: "q", Incarnation: 10, Echo: l.n.stream(id).nonce, More: true}, us...); err != nil {
				break
			}
			told += len(us)
			l.n.take()
		}
	}
	if told > 5*maxMembers {
		t.Errorf("streams brought %d updates", told)
	}
	if err := frame(-1000, head{Kind: kExchange, From: "d", Incarnation: 10, Nonce: 1, Digest: l.n.digest()}); err != nil {
		t.Fatal(err)
	}
	if err := frame(-1000, head{Kind: kTable, From: "d", Incarnation: 10, Echo: l.n.stream(-1000).nonce}, memberUpdate(labMember(3))); err != nil {
		t.Errorf("a member that joins meanwhile: %v", err)
	}
}

func TestEachHolderOfANameIsAskedBeforeAnotherTakesIt(t *testing.T) {
	l := newLab(t, 3)
	e := l.n.t.get("b")
	for i := range 2 {
		m := e.Member
		m.Addr, m.Born, m.Incarnation = labMember(5+i).Addr, m.Born+10, m.Incarnation+10
		if !l.n.disputed(e, m) {
			t.Fatalf("namesake %d is believed at once", i+1)
		}
		l.n.now += rivalFor
		if l.n.disputed(e, m) {
			t.Fatalf("namesake %d is not believed when the holder is silent", i+1)
		}
		l.n.adopt(m, &update{})
	}
}

// A name can be refused to a join command while an exchange of the node's own is
// under way.
func TestARefusedNameEndsTheExchangesThatWaited(t *testing.T) {
	l := newLab(t, 2)
	n := l.n
	n.everJoined = false
	rival := labMember(0)
	rival.Addr, rival.Born, rival.Incarnation = labMember(5).Addr, 20, 20
	n.exchange(n.t.get("b"))
	n.join(l.now, 1, []netip.AddrPort{labMember(2).Addr}, nil)
	for _, s := range slices.Clone(n.streams) {
		if s.want != kExchange {
			continue
		}
		n.dialed(l.now, s.id, nil)
		h, table := head{Kind: kWelcome, From: "b", Incarnation: 10, Nonce: 3, Echo: s.nonce, Digest: 7}, memberUpdate(rival)
		if err := n.frame(l.now, s.id, l.c.head(nil, &h)); err != nil {
			t.Fatal(err)
		}
		h = head{Kind: kTable, From: "b", Incarnation: 10, Echo: s.nonce}
		if err := n.frame(l.now, s.id, l.c.update(l.c.head(nil, &h), &table)); err != nil {
			t.Fatal(err)
		}
	}
	if n.rival == nil || len(n.rival.again) != 2 {
		t.Fatal("both exchanges should wait for the rival's answer")
	}
	n.rivalAnswered(20)
	o := n.take()
	if o.fatal != nil || len(o.joins) != 1 || !strings.Contains(strings.Join(o.joins[0].errs, ""), "is taken") {
		t.Errorf("joins %+v, fatal %v", o.joins, o.fatal)
	}
}

func TestForceLeaveIsRefusedForTheLivingAndTheUnknown(t *testing.T) {
	l := newLab(t, 2)
	for name, want := range map[string]string{"a": "alive", "b": "alive", "x": "no member"} {
		if err := l.n.forceLeave(l.now, name, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("force-leave %s: %v", name, err)
		}
	}
}

func TestAUserEventThatIsTooLongSaysBothNumbers(t *testing.T) {
	l := newLab(t, 1)
	err := l.n.userEvent(0, "deploy", make([]byte, 1019), false)
	if err == nil || !strings.Contains(err.Error(), "1025") || !strings.Contains(err.Error(), "1024") {
		t.Errorf("got %v", err)
	}
	if err := l.n.userEvent(0, "deploy", make([]byte, 1018), false); err != nil {
		t.Error(err)
	}
}
