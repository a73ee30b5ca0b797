// members.go: the members of the cluster, and what is believed about each of them.
//
// Here live the member record, what is said of members (update), the one rule that decides between two claims, the
// table with its digest and its rings, and the events that a change of belief brings. It knows nothing of bytes on a
// wire, sockets or clocks. At the end stands how members and events are chosen and shown.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"math/bits"
	"net/netip"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Limits on what a member may carry (in bytes), and on how many there may be.
const (
	maxName    = 128
	maxTags    = 512
	maxVersion = 32
	maxExt     = 256
	maxMembers = 1 << 14
	maxPayload = 1024 // of a user event or a query, with its name, and of an answer
)

// ---- members ----

// Status is what is believed about a member. Among claims of one incarnation the later status wins.
type Status uint8

const (
	statusAlive   Status = iota + 1
	statusSuspect        // unreachable for two observers; still shown as alive
	statusLeaving        // only ever shown by a member about itself
	statusFailed
	statusLeft
	statusPruned // left and to be forgotten; not shown any more
)

// statusNames are the words that users see; the index is the Status.
var statusNames = [...]string{"unknown", "alive", "alive", "leaving", "failed", "left", "pruned"}

// String is safe for any number: a command shows what the agent says, whatever that is.
func (s Status) String() string {
	if int(s) >= len(statusNames) {
		return statusNames[0]
	}
	return statusNames[s]
}

// isDead reports whether the member is believed to be gone.
func (s Status) isDead() bool { return s >= statusFailed }

// Tags are a member's key=value pairs, sorted by key and joined by NUL, so that a Member stays comparable and
// goes flat on the wire.
type Tags string

// makeTags checks and packs tags. Keys must not be empty or hold '=' or NUL; all together may take maxTags bytes.
func makeTags(kv map[string]string) (Tags, error) {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(kv)) {
		pair := k + "=" + kv[k]
		if k == "" || strings.Contains(k, "=") || strings.Contains(pair, "\x00") {
			return "", fmt.Errorf("bad tag %q: a tag is key=value, and the key may not be empty or hold a '='", pair)
		}
		pairs = append(pairs, pair)
	}

	t := Tags(strings.Join(pairs, "\x00"))
	if len(t) > maxTags {
		return "", fmt.Errorf("tags take %d bytes, the limit is %d", len(t), maxTags)
	}
	return t, nil
}

// splitNUL splits what NUL separates: of Tags it is "key=value", sorted by key.
func splitNUL[S ~string](s S) []string {
	if s == "" {
		return nil
	}
	return strings.Split(string(s), "\x00")
}

// asMap returns the tags as a map; it is never nil.
func (t Tags) asMap() map[string]string {
	kv := make(map[string]string)
	for _, tag := range splitNUL(t) {
		k, v, _ := strings.Cut(tag, "=")
		kv[k] = v
	}
	return kv
}

// Member is one claim about one member.
type Member struct {
	Name string
	Addr netip.AddrPort
	// Incarnation orders the claims about a name. It starts as Instance, and only the member itself raises it: to
	// refute a claim, or to change its tags.
	Incarnation uint64
	// Instance tells the agent from those that had its name before; see newInstanceID.
	Instance uint64
	Status   Status
	Tags     Tags
	// Version is the release that the member runs, Protocol the highest protocol that it understands.
	Version  string
	Protocol uint8
	// Ext is for what later versions will say of a member. This one passes it on, unread.
	Ext string
}

func (m Member) with(s Status) Member {
	m.Status = s
	return m
}

// sameInstance reports whether m and o are about one instance.
func (m Member) sameInstance(o Member) bool { return m.Name == o.Name && m.Instance == o.Instance }

// instanceRandomBits is how many random bits stand below the milliseconds of an instance ID.
const instanceRandomBits = 14

// newInstanceID makes the ID of an instance that starts at unixMs. Later starts are higher, so that a restarted
// agent supersedes its former instance without any file; the random bits tell apart two that start in one
// millisecond.
func newInstanceID(unixMs, random uint64) uint64 {
	return unixMs<<instanceRandomBits | random>>(64-instanceRandomBits)
}

// supersedes is the one rule that decides which of two claims about a name wins: the higher incarnation, then
// the later instance, then the worse status. One instance has one address; see sanitizeClaim.
func (m Member) supersedes(old Member) bool {
	return cmp.Or(
		cmp.Compare(m.Incarnation, old.Incarnation),
		cmp.Compare(m.Instance, old.Instance),
		cmp.Compare(m.Status, old.Status),
		// What is left differs only if somebody forges. It makes the order total, so that no two members can
		// believe different claims.
		cmp.Compare(m.Tags, old.Tags),
		cmp.Compare(m.Version, old.Version),
		cmp.Compare(m.Protocol, old.Protocol),
		cmp.Compare(m.Ext, old.Ext),
	) > 0
}

// validName returns an error that says why s cannot name a member.
func validName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("the node name is empty")
	case len(s) > maxName:
		return fmt.Errorf("node name %.32q... takes %d bytes, the limit is %d", s, len(s), maxName)
	case !utf8.ValidString(s):
		return fmt.Errorf("node name %q is not valid UTF-8", s)
	case strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fmt.Errorf("node name %q holds blanks or control characters", s)
	}
	return nil
}

// isValid reports whether a claim from outside can be one about a member.
func (m Member) isValid() bool {
	tags, err := makeTags(m.Tags.asMap())
	if err != nil || tags != m.Tags {
		return false
	}
	if validName(m.Name) != nil || validName("v"+m.Version) != nil {
		return false
	}
	if len(m.Version) > maxVersion || len(m.Ext) > maxExt {
		return false
	}
	if m.Status == 0 || m.Status == statusLeaving || m.Status > statusPruned {
		return false
	}
	return m.Instance <= m.Incarnation && isMemberAddr(m.Addr)
}

// isMemberAddr reports whether a member can live at addr.
func isMemberAddr(addr netip.AddrPort) bool {
	ip := addr.Addr()
	if !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() {
		return false
	}
	return addr.Port() != 0 && validName("%"+ip.Zone()) == nil
}

// ---- updates and events ----

// eventKind is the kind of an event; its String is what handlers are told.
type eventKind uint8

const (
	eventJoin eventKind = iota + 1
	eventLeave
	eventFailed
	eventUpdate
	eventReap
	eventUser
	eventQuery
	eventAnswer // to a query of this agent: for the command that asked, not for handlers
)

// eventNames are Serf's words for the kinds; the index is the eventKind, where 0 is no event: a member is there.
var eventNames = [...]string{
	"member", "member-join", "member-leave", "member-failed", "member-update", "member-reap", "user", "query",
}

// String is safe for any number, as that of a Status.
func (k eventKind) String() string {
	if int(k) >= len(eventNames) {
		return "unknown"
	}
	return eventNames[k]
}

// update is one claim about a member, or (Name set) a user event or query of Member.
type update struct {
	Member   Member
	Age      uint64 // milliseconds: since the member came in or died, or the event was sent
	Name     string
	Payload  []byte
	LTime    uint64 // Lamport time at which it was sent
	Coalesce bool   // of several that wait in a queue, the last will do
	Timeout  uint32 // of a query: milliseconds in which it wants answers
	Number   uint64 // of a user event among its sender's; of a claim in a table: how many of the member's are known
	Nonce    uint32 // of a user event: it cannot be made up before the event is sent
	Before   bool   // a user event that the teller has not delivered: it is older than the teller's membership

	// Of a claim in a table: the instance before this one whose user events are known, and how many they are.
	Former       uint64
	FormerNumber uint64
}

func (u *update) id() eventID { return eventID{u.Number, u.Nonce} }

// Event is one thing that handlers, the log and watchers are told: something that happened to Member, what a user
// sent, whose sender is Member, or (eventAnswer) the Payload that came back from there.
type Event struct {
	kind eventKind
	update
	id      uint32 // eventQuery: the asker's number of it; eventAnswer: this agent's
	reply   reply  // eventAnswer
	changed string // eventUpdate: what has changed, as in "state=drain -health"
}

// validatePayload returns an error that says why a user event or query is refused.
func validatePayload(what, name string, payload []byte) error {
	size := len(name) + len(payload)
	if size > maxPayload {
		return fmt.Errorf("%s name and payload take %d bytes, the limit is %d", what, size, maxPayload)
	}
	if name == "" {
		return fmt.Errorf("the %s has no name", what)
	}
	return nil
}

const (
	// rings is how many orderings of the members there are. Each member has one successor, its watcher, on each.
	rings = 4
	// maxWalk bounds how many members are walked over for one neighbour. Without it, forged suspects could make
	// every walk as long as the table. Of real suspects so many in a row are never seen.
	maxWalk = 64
	// maxEvents is how many user events are remembered while many are sent, and keptEvents how many of them for
	// longer.
	maxEvents  = 2048
	keptEvents = 128
	// eventWindow is how many of its events a member may have under way: sent, and perhaps not yet known to all.
	// No honest number is further ahead, but for a member that was not waited for.
	eventWindow = 128
	// maxVariants is how many events may claim one number: a forger can use a number before its owner does, and
	// the owner's event counts nevertheless.
	maxVariants = 4
	// maxCount bounds Lamport times and numbers of events. At most countStep is believed at once, so that no
	// forged number uses them up: nothing that is true grows by so much between two messages.
	maxCount  = 1 << 62
	countStep = 1 << 32

	// A member that fails again within flapWindow after it came back flaps.
	flapWindow       = time.Minute
	firstFlapWait    = 15 * time.Second
	maxFlapDoublings = 9
)

// ---- the table ----

// claim is what is believed about a name, with its places on the rings. It never changes, so that the tables
// of a simulation can share it: ten thousand of them fit into memory.
type claim struct {
	Member
	pos [rings]uint64
}

// entry is what the table holds about one name.
type entry struct {
	*claim
	local      localView
	since      time.Duration // when this instance came into the cluster, or came back, or died
	proven     uint64        // the highest incarnation that was learnt from the member itself
	firstHeard time.Duration // when the name was first heard of, on the caller's clock
	state      *peerState    // the protocol's, with this instance; another one starts anew
	events     *eventSource  // what is known of its user events; nil: nothing
}

// localView is what this node alone makes of a claim. It is told to nobody: exported, it would make all members fail
// when a split heals.
type localView struct {
	announced Status // as which events last showed it; 0: not yet, or not any more
	isolated  bool   // it failed for this node, which was cut off
	damped    bool   // it flaps: it came back by hearsay, and has not answered since; see damp
	reaped    bool   // kept, so that the old claim does not come back through a member that has not reaped yet
}

// displayStatus is the status that users see; 0: they do not see the member.
func (e *entry) displayStatus() Status {
	switch {
	case e.local.reaped || e.Status == statusPruned:
		return 0
	case e.failedLocally() && !e.Status.isDead():
		return statusFailed
	case e.Status == statusSuspect: // a suspicion is short, and settles itself
		return statusAlive
	}
	return e.Status
}

// failedLocally reports whether the member failed for this node alone, whatever the record says.
func (e *entry) failedLocally() bool { return e.local.isolated || e.local.damped }

// noteFirstHeard notes when the name was first heard of, on the caller's clock.
func (e *entry) noteFirstHeard(real time.Duration) {
	if e.firstHeard == 0 {
		e.firstHeard = real
	}
}

// isSkipped reports whether e is walked over on the rings: it may be gone, and not pass on what it is told.
func (e *entry) isSkipped() bool { return e.Status != statusAlive || e.failedLocally() }

// table holds all that is believed. Not safe for concurrent use.
type table struct {
	ordered      []*entry        // by name, so that no map order can show
	dead         []death         // those that are not alive, by when they died
	ring         [rings][]*entry // those believed alive, in ring order
	digest       uint64          // XOR over the entries that are not reaped
	eventsDigest uint64          // the same over how many events of each are known
	// forgotten is the highest instance whose protocol state was dropped. What was recorded of such an instance
	// must not count again when it comes back, after a split or a conflict: see apply.
	forgotten uint64
	version   uint64   // counts changes of the rings, or of what is walked over on them
	shrunk    uint64   // the version that last took a member off
	failed    int      // members that may come back, of
	total     int      // all that have neither left nor been forgotten
	damped    []*entry // those that came back by hearsay alone; see damp
	events    []Event  // since takeEvents
}

// index returns where name is in ordered, or would be.
func (t *table) index(name string) (int, bool) {
	byName := func(e *entry, name string) int { return strings.Compare(e.Name, name) }
	return slices.BinarySearchFunc(t.ordered, name, byName)
}

func (t *table) get(name string) *entry {
	at, found := t.index(name)
	if !found {
		return nil
	}
	return t.ordered[at]
}

// ended reports whether m's instance is believed to have ended.
func (t *table) ended(m Member) bool {
	e := t.get(m.Name)
	return e == nil || e.Instance != m.Instance || e.Status.isDead()
}

// apply takes claim m into the table, if it wins over what is there. It returns the entry of m's name, or nil if m
// was refused: it lost, or it is about a new name and the table is full. age is how long ago the member came in,
// or died.
func (t *table) apply(now time.Duration, m Member, age time.Duration) *entry {
	e := t.get(m.Name)
	if e != nil && !m.supersedes(e.Member) {
		return nil
	}
	if e == nil {
		e = t.insert(now, m.Name)
	}
	if e == nil {
		return nil
	}

	next := *e
	if m.Instance != e.Instance { // nothing that is known of the former instance holds for this one
		t.dropState(&next)
		next.local.isolated = false
		next.local.damped = false
		if m.Instance <= t.forgotten {
			next.state = &peerState{datagrams: closedWindow()}
		}
	}
	next.since = e.sinceClaim(m, now, age)
	next.claim = &claim{m, e.pos}
	next.local.reaped = false
	t.change(now, e, next)
	return e
}

// sinceClaim is when the instance of m, a claim that wins over e, came into the cluster, or came back, or died;
// age is how long ago, by the claim, it came in or died.
func (e *entry) sinceClaim(m Member, now, age time.Duration) time.Duration {
	dead := m.Status.isDead()
	wasDead := e.Status.isDead()
	switch {
	case dead && (!wasDead || e.Incarnation != m.Incarnation):
		return now - age
	case !dead && e.Instance != m.Instance:
		return now - age
	case !dead && wasDead:
		return now
	}
	return e.since
}

// insert adds an entry for a new name. It counts as reaped, and so nowhere, until a claim is applied to it. nil:
// there is no room, and no dead member.
func (t *table) insert(now time.Duration, name string) *entry {
	// The dead must not keep a newcomer out.
	if len(t.ordered) >= maxMembers {
		t.dropOldest(now)
	}
	if len(t.ordered) >= maxMembers {
		return nil
	}

	c := &claim{Member: Member{Name: name, Status: statusPruned}}
	for ring := range c.pos {
		c.pos[ring] = ringHash(ring, name)
	}
	e := &entry{claim: c, local: localView{reaped: true}}
	at, _ := t.index(name)
	t.ordered = slices.Insert(t.ordered, at, e)
	return e
}

// dropOldest drops the member that has been dead for longest.
func (t *table) dropOldest(now time.Duration) {
	if len(t.dead) == 0 {
		return
	}
	e := t.dead[0].e
	next := *e
	next.local.reaped = true
	t.change(now, e, next)

	t.dropState(e)
	t.dead[0] = death{}
	t.dead = t.dead[1:]
	at, _ := t.index(e.Name)
	t.ordered = slices.Delete(t.ordered, at, at+1)
}

// death is one that is dead. It keeps the time at which it was put in order, whatever becomes of the entry.
type death struct {
	since time.Duration
	e     *entry
}

// updateDead keeps the dead in order after a change of e from was.
func (t *table) updateDead(was, e *entry) {
	if !was.Status.isDead() && !e.Status.isDead() {
		return
	}

	at, found := t.deadIndex(was.Name, was.since)
	if found && e.Status.isDead() && e.since == was.since {
		return
	}
	if found {
		t.dead = slices.Delete(t.dead, at, at+1)
	}
	if e.Status.isDead() {
		at, _ = t.deadIndex(e.Name, e.since)
		t.dead = slices.Insert(t.dead, at, death{e.since, e})
	}
}

func (t *table) deadIndex(name string, since time.Duration) (int, bool) {
	return slices.BinarySearchFunc(t.dead, name, func(d death, name string) int {
		if d.since != since {
			return cmp.Compare(d.since, since)
		}
		return strings.Compare(d.e.Name, name)
	})
}

// prove notes that m has told its incarnation itself.
func (t *table) prove(m Member) {
	e := t.get(m.Name)
	if e != nil && m.Incarnation <= firstHandLimit {
		e.proven = max(e.proven, m.Incarnation)
	}
}

// dropState drops what the protocol knows of e's instance.
func (t *table) dropState(e *entry) {
	if e.state != nil {
		t.forgotten = max(t.forgotten, e.Instance)
	}
	e.state = nil
}

// setIsolated marks or clears "failed for this node alone".
func (t *table) setIsolated(now time.Duration, e *entry, isolated bool) {
	if e.local.isolated == isolated {
		return
	}
	next := *e
	next.local.isolated = isolated
	t.change(now, e, next)
}

// release shows a damped member again, which has answered.
func (t *table) release(now time.Duration, e *entry) {
	if !e.local.damped {
		return
	}
	next := *e
	next.local.damped = false
	t.change(now, e, next)
}

// takeEvents returns the events since the last time.
func (t *table) takeEvents() []Event {
	events := t.events
	t.events = nil
	return events
}

// change makes e what next says, and brings about what follows: in the sums, on the rings, and as events.
func (t *table) change(now time.Duration, e *entry, next entry) {
	was := *e
	t.count(e, -1)
	*e = next
	if e.Instance == was.Instance {
		e.damp(now, was.local.damped)
	}
	t.count(e, +1)

	t.updateDead(&was, e)
	if e.Status.isDead() != was.Status.isDead() {
		t.updateRings(e)
	}
	if e.local.damped != was.local.damped {
		t.updateDamped(e)
	}
	// Walks over the rings may end elsewhere from now on.
	moved := e.Status != was.Status || e.Instance != was.Instance
	if moved || e.failedLocally() != was.failedLocally() {
		t.version++
		if e.isSkipped() {
			t.shrunk = t.version
		}
	}
	t.announce(e, was.with(e.local.announced))
}

// updateRings puts e on the rings, or takes it off them, after it came to life or died.
func (t *table) updateRings(e *entry) {
	for i, ring := range t.ring {
		at, found := t.ringIndex(i, e)
		if found {
			t.ring[i] = slices.Delete(ring, at, at+1)
		} else {
			t.ring[i] = slices.Insert(ring, at, e)
		}
	}
}

// updateDamped puts e among the damped, or takes it out.
func (t *table) updateDamped(e *entry) {
	if e.local.damped {
		t.damped = append(t.damped, e)
		return
	}
	t.damped = slices.DeleteFunc(t.damped, func(o *entry) bool { return o == e })
}

// damp takes a change of e, an instance that stays. A member whose advertised address not all others reach fails,
// hears of it, refutes, and is failed again, for ever, and all handlers are told each time. So the first time it
// comes back at once, by hearsay too: that is how a split heals. After it has failed again soon after that,
// hearsay is not enough: it is damped, which shows it as failed, until it answers. The record is untouched, so that
// all tables stay the same.
func (e *entry) damp(now time.Duration, wasHeld bool) {
	shown := e.displayStatus()
	switch {
	case e.local.announced == statusAlive && shown == statusFailed:
		if e.state != nil {
			e.state.flap.noteFailure(now)
		}
	case e.local.announced == statusFailed && shown == statusAlive:
		flap := &e.peer().flap
		if flap.count > 0 && !wasHeld {
			e.local.damped = true
			return
		}
		flap.cameBack = now
		flap.dampedUntil = 0
	}
}

// noteFailure counts a failure that came soon after a return.
func (f *flapState) noteFailure(now time.Duration) {
	if f.cameBack == 0 {
		return
	}
	proven := now-f.cameBack > flapWindow+flapWait(f.count)
	if proven {
		f.count = 0
		return
	}
	f.count++
}

// flapWait is for how long a member is damped that has flapped so often: ever longer, up to some two hours.
func flapWait(flaps int) time.Duration {
	if flaps == 0 {
		return 0
	}
	return firstFlapWait << min(flaps-1, maxFlapDoublings)
}

// count adds e to the sums over the table, or takes it out.
func (t *table) count(e *entry, by int) {
	if e.local.reaped {
		return
	}
	t.digest ^= e.digest()
	t.eventsDigest ^= e.eventDigest()
	if e.Status < statusLeft {
		t.total += by
	}
	if e.displayStatus() == statusFailed {
		t.failed += by
	}
}

// announce tells the events that lead from was, with the status that was announced last, to what is visible now.
// Per member they alternate: no member joins twice without an end between.
func (t *table) announce(e *entry, was Member) {
	is := e.with(e.displayStatus())
	if was.Status == statusLeft && is.Status == statusFailed {
		is.Status = statusLeft // no event tells of it, or it would leave twice
	}
	e.local.announced = is.Status

	// Of an agent that has restarted between two claims, the end was never noticed.
	if was.Status == statusAlive && is.Status == statusAlive && was.Instance != is.Instance {
		was.Status = statusFailed
		t.tell(eventFailed, was, "")
	}

	switch {
	case is.Status == statusAlive && was.Status != statusAlive:
		t.tell(eventJoin, is, "")
	case is.Status == statusAlive && (was.Addr != is.Addr || was.Tags != is.Tags):
		t.tell(eventUpdate, is, changes(was, is))
	case is.Status == statusFailed && was.Status == statusAlive:
		t.tell(eventFailed, is, "")
	case e.Status >= statusLeft && (was.Status == statusAlive || was.Status == statusFailed):
		was.Status = statusLeft
		t.tell(eventLeave, is.with(statusLeft), "")
	}
	if is.Status == 0 && was.Status != 0 {
		t.tell(eventReap, is.with(was.Status), "")
	}
}

func (t *table) tell(k eventKind, m Member, changed string) {
	t.events = append(t.events, Event{kind: k, update: update{Member: m}, changed: changed})
}

// changes is what differs between two claims about a member: new values of tags, and of its address; a "-" stands
// before what is gone.
func changes(was, is Member) string {
	var list []string
	if was.Addr != is.Addr {
		list = append(list, is.Addr.String())
	}
	before := splitNUL(was.Tags)
	for _, tag := range splitNUL(is.Tags) {
		if !slices.Contains(before, tag) {
			list = append(list, tag)
		}
	}

	after := is.Tags.asMap()
	for _, tag := range before {
		key, _, _ := strings.Cut(tag, "=")
		if _, stays := after[key]; !stays {
			list = append(list, "-"+key)
		}
	}
	return strings.Join(list, " ")
}

// reap hides the members that have been dead for longer than after, and drops them after as long again.
func (t *table) reap(now, after time.Duration) {
	dropped := 0
	for _, d := range t.dead {
		if now-d.since < after {
			break // and all others died later
		}
		e := d.e
		if !e.local.reaped {
			next := *e
			next.local.reaped = true
			next.local.damped = false
			t.change(now, e, next)
		}
		if now-e.since >= 2*after {
			t.dropState(e)
			dropped++
		}
	}
	if dropped == 0 {
		return
	}

	t.dead = slices.Delete(t.dead, 0, dropped)
	t.ordered = slices.DeleteFunc(t.ordered, func(e *entry) bool {
		return e.Status.isDead() && now-e.since >= 2*after
	})
}

// agreesAround reports whether digest, with or without events, is the table's but for members that died between
// from and to: those are about to be forgotten, or just were, and the other side does that a moment earlier or
// later.
func (t *table) agreesAround(digest uint64, from, to time.Duration) bool {
	first, _ := t.deadIndex("", from)
	last, _ := t.deadIndex("", to)

	// It begins as if none of them was forgotten yet.
	claims := t.digest
	events := t.eventsDigest
	for _, d := range t.dead[first:last] {
		if d.e.local.reaped {
			claims ^= d.e.digest()
			events ^= d.e.eventDigest()
		}
	}

	// They go in the order in which they died, so there are only as many digests that the other side may have.
	for _, d := range t.dead[first:last] {
		if digest == claims || digest == claims^events {
			return true
		}
		claims ^= d.e.digest()
		events ^= d.e.eventDigest()
	}
	return digest == claims || digest == claims^events
}

// aliveCount counts the members on the rings, this node included.
func (t *table) aliveCount() int { return len(t.ring[0]) }

// ringIndex is where e stands on ring i, or would stand, and whether it does.
func (t *table) ringIndex(i int, e *entry) (int, bool) {
	return slices.BinarySearchFunc(t.ring[i], e, func(a, b *entry) int {
		if a.pos[i] != b.pos[i] {
			return cmp.Compare(a.pos[i], b.pos[i])
		}
		return strings.Compare(a.Name, b.Name)
	})
}

// watchers returns the members that watch e. In a small cluster all others do.
func (t *table) watchers(e *entry) []*entry { return t.successors(e, (*entry).isSkipped) }

// successors returns the members that follow e: on each ring the next neighbour that is not skipped and that no
// earlier ring has given, since rings over few members coincide and would leave some with one watcher.
func (t *table) successors(e *entry, isSkipped func(*entry) bool) []*entry {
	ws := make([]*entry, 0, rings)
	for i := range t.ring {
		for w := range t.neighbours(i, e, +1) {
			if !isSkipped(w) && !slices.Contains(ws, w) {
				ws = append(ws, w)
				break
			}
		}
	}
	return ws
}

// watched returns the members whose watcher e is. Suspects are among them: the accuser may die before the verdict.
func (t *table) watched(e *entry) (ps []*entry) {
	for i := range t.ring {
		for p := range t.neighbours(i, e, -1) {
			if !p.failedLocally() && !slices.Contains(ps, p) && slices.Contains(t.watchers(p), e) {
				ps = append(ps, p)
			}
		}
	}
	return ps
}

// neighbours yields the others on ring i, from e on in direction dir, as far as a watcher of e may stand, or a
// member that e watches: rings places, not counting those that are walked over, of which there may be many.
func (t *table) neighbours(i int, e *entry, dir int) iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		ring := t.ring[i]
		at, _ := t.ringIndex(i, e)
		left := rings
		for step := 1; step < min(len(ring), maxWalk+1) && left > 0; step++ {
			o := ring[(at+dir*step+len(ring))%len(ring)]
			if !yield(o) {
				return
			}
			if !o.isSkipped() {
				left--
			}
		}
	}
}

// digest is this entry's part of the table's digest.
func (e *entry) digest() uint64 {
	// A suspicion is not worth a state sync: it counts as alive does. The instance counts, since two of them may
	// have refuted each other up to one incarnation.
	status := uint64(max(e.Status, statusSuspect)) << 60
	return mix(e.pos[0] ^ mix(e.Incarnation^status) ^ mix(e.Instance))
}

// ringHash places a name on a ring. FNV alone leaves similar names (web1, web2) near each other on every
// ring, so its result is mixed.
func ringHash(ring int, name string) uint64 {
	h := fnv.New64a()
	h.Write(append([]byte{byte(ring)}, name...))
	return mix(h.Sum64())
}

// mix is a 64-bit finalizer: it multiplies by an odd constant and folds the product's high half into the low one.
func mix(x uint64) uint64 {
	hi, lo := bits.Mul64(x^0x9e3779b97f4a7c15, 0xd6e8feb86659fd93)
	return hi ^ lo
}

// ---- user events ----

// eventSource is what is known of the user events of one instance of a member. They are numbered from 1, and
// counted in that order: what comes early waits.
type eventSource struct {
	instance uint64
	number   uint64       // all up to this one are known
	floor    uint64       // what is not known up to this one is over, and never counts
	recent   []eventID    // those of the last numbers
	held     []heardEvent // further ahead than number+1, in order
	kept     int          // how many are in the buffer
	ran      bool         // one has run handlers here
	former   *eventSource
}

type eventID struct {
	number uint64
	nonce  uint32
}

// heardEvent is a user event, when it was sent on the caller's clock, and whether it runs handlers here.
type heardEvent struct {
	update update
	sent   time.Duration
	fresh  bool
}

// eventSource returns what is known of the events of e's instance, for which it makes room, or of a former one;
// nil: nothing.
func (e *entry) eventSource(instance uint64) *eventSource {
	s := e.knownEvents(instance)
	if s == nil && instance == e.Instance {
		s = &eventSource{instance: instance, former: e.formerEvents()}
		s.endChain()
		e.events = s
	}
	return s
}

// knownEvents returns what is known of the events of an instance; nil: nothing.
func (e *entry) knownEvents(instance uint64) *eventSource {
	s := e.events
	for s != nil && s.instance != instance {
		s = s.former
	}
	return s
}

// endChain forgets what came before the former instance, or the chain would grow with each restart.
func (s *eventSource) endChain() {
	if s.former != nil {
		s.former.former = nil
	}
}

// formerEvents returns what is known of the events of the last instance before e's that is known to have sent any;
// nil: nothing. What has come of them when the sender ended is all that there will be, and some members have less
// of it than others. So it is compared, too.
func (e *entry) formerEvents() *eventSource {
	s := e.events
	for s != nil && (s.instance == e.Instance || s.number == 0) {
		s = s.former
	}
	return s
}

// addFormer makes room for the events of a former instance of e, which has sent some by another table. False: a
// later one is known, or there can have been none.
func (e *entry) addFormer(instance uint64) bool {
	known := e.formerEvents()
	if known != nil && known.instance >= instance {
		return false
	}
	// Of two agents with one name a later one may have been before, but in a lower incarnation.
	if instance == e.Instance || instance > e.Incarnation {
		return false
	}

	former := &eventSource{instance: instance, former: known}
	former.endChain()
	current := e.eventSource(e.Instance)
	current.former = former
	e.events = current
	return true
}

// eventCount is how many events of e's instance are known.
func (e *entry) eventCount() uint64 {
	s := e.knownEvents(e.Instance)
	if s == nil {
		return 0
	}
	return s.number
}

// eventDigest is this entry's part of the digest over events. It covers what a table tells of them, and no more:
// what two members cannot tell each other would differ for ever.
func (e *entry) eventDigest() (sum uint64) {
	if count := e.eventCount(); count > 0 {
		sum = mix(e.pos[0] ^ mix(e.Instance^mix(count)))
	}
	if s := e.formerEvents(); s != nil {
		sum ^= mix(e.pos[0] ^ mix(s.instance^mix(s.number)))
	}
	return sum
}

// advance notes that all events of e up to number are known.
func (t *table) advance(e *entry, s *eventSource, number uint64) {
	counts := !e.local.reaped
	if counts {
		t.eventsDigest ^= e.eventDigest()
	}
	s.number = number
	if counts {
		t.eventsDigest ^= e.eventDigest()
	}
}

// skip gives up the events up to number that have not come.
func (t *table) skip(e *entry, s *eventSource, number uint64) {
	s.floor = number
	t.advance(e, s, number)
	s.held = slices.DeleteFunc(s.held, func(h heardEvent) bool { return h.update.Number <= number })
}

// isNew reports whether an event that is not ahead of its turn has not come before.
func (s *eventSource) isNew(id eventID) bool {
	if id.number > s.number {
		return true
	}
	if id.number <= s.floor || id.number+eventWindow <= s.number || slices.Contains(s.recent, id) {
		return false
	}
	variants := 0
	for _, r := range s.recent {
		if r.number == id.number {
			variants++
		}
	}
	return variants < maxVariants
}

// remember notes that the event has come.
func (s *eventSource) remember(id eventID) {
	const limit = eventWindow * maxVariants
	if len(s.recent) >= limit {
		s.recent = slices.DeleteFunc(s.recent, func(r eventID) bool { return r.number+eventWindow <= s.number })
	}
	s.recent = append(s.recent, id)
}

// hold keeps an event that is ahead of its turn. False: it is there already, or there is no room and it has to
// come again.
func (s *eventSource) hold(h heardEvent) bool {
	if h.update.Number > s.number+eventWindow || len(s.held) >= eventWindow {
		return false
	}
	at := 0
	for ; at < len(s.held) && s.held[at].update.Number <= h.update.Number; at++ {
		if s.held[at].update.id() == h.update.id() {
			return false
		}
	}
	s.held = slices.Insert(s.held, at, h)
	return true
}

// bufferedEvent is one remembered user event, as it travels.
type bufferedEvent struct {
	update
	position uint64 // in the order in which this node has heard them
	source   *eventSource
	sent     time.Duration // on the caller's clock, as far as is known
}

// eventBuffer is the latest user events, for those who have missed some.
type eventBuffer struct {
	lamport  uint64          // the highest time heard of
	recent   []bufferedEvent // in the order in which they were heard
	position uint64
}

// witness takes a Lamport time. The clock follows, but not far at once: one forged time would use it up.
func (b *eventBuffer) witness(ltime uint64) {
	b.lamport = max(b.lamport, min(ltime, b.lamport+countStep))
}

// add remembers an event of source.
func (b *eventBuffer) add(u update, source *eventSource, sent time.Duration) {
	if len(b.recent) >= maxEvents {
		b.makeRoom()
	}
	b.position++
	b.recent = append(b.recent, bufferedEvent{u, b.position, source, sent})
	source.kept++
}

// makeRoom drops the oldest event of the sender that takes most room, so that no sender can push out what others
// have sent.
func (b *eventBuffer) makeRoom() {
	most := 0
	for i, ev := range b.recent {
		if ev.source.kept > b.recent[most].source.kept {
			most = i
		}
	}
	b.drop(most, most+1)
}

// drop forgets the events from place i to place j.
func (b *eventBuffer) drop(i, j int) {
	for _, ev := range b.recent[i:j] {
		ev.source.kept--
	}
	b.recent = slices.Delete(b.recent, i, j)
}

// trim forgets what was sent before then, but for the last keptEvents.
func (b *eventBuffer) trim(before time.Duration) {
	old := 0
	for old < len(b.recent)-keptEvents && b.recent[old].sent < before {
		old++
	}
	b.drop(0, old)
}

// ---- how members are chosen and listed ----

// memberFilter is what members must match, by field: "name", "status", or a tag as "tag KEY".
type memberFilter map[string]*regexp.Regexp

// set returns the way to take FIELD=RE, or what is missing of it after a prefix.
func (f memberFilter) set(prefix string) func(string) error {
	return func(s string) error {
		field, re, ok := strings.Cut(prefix+s, "=")
		if !ok {
			return errors.New("want KEY=RE, such as role=web")
		}
		r, err := regexp.Compile("^(?s:" + re + ")$")
		if se, ok := errors.AsType[*syntax.Error](err); ok {
			return fmt.Errorf("%q is not a regular expression: %s", re, se.Code)
		}
		f[field] = r
		return nil
	}
}

func (f memberFilter) matches(m Member) bool {
	fields := map[string]string{"name": m.Name, "status": m.Status.String()}
	for k, v := range m.Tags.asMap() {
		fields["tag "+k] = v
	}
	for field, re := range f {
		if v, ok := fields[field]; !ok || !re.MatchString(v) {
			return false
		}
	}
	return true
}

// memberStatus is a member, and for how long it has had its status.
type memberStatus struct {
	Member
	lasted time.Duration
}

func aliveNames(members []memberStatus) (names []string) {
	for _, m := range members {
		if m.Status == statusAlive {
			names = append(names, m.Name)
		}
	}
	return names
}

// compareNames orders names as people count: host-8 before host-79. Of equal numbers, the one with fewer zeros is
// first.
func compareNames(a, b string) int {
	if order := strings.Compare(countingKey(a), countingKey(b)); order != 0 {
		return order
	}
	return len(a) - len(b)
}

// countingKey is a text that sorts as its name should: each number in it begins with the count of its digits.
func countingKey(name string) string {
	key := make([]byte, 0, len(name)+16)
	for name != "" {
		digits := name[:len(name)-len(strings.TrimLeft(name, "0123456789"))]
		if digits == "" {
			key = append(key, name[0])
			name = name[1:]
			continue
		}
		number := strings.TrimLeft(digits, "0")
		// '0', so that a number stands among other characters as a digit does
		key = append(key, '0', byte(len(number)))
		key = append(key, number...)
		name = name[len(digits):]
	}
	return string(key)
}

// membersText makes columns at least four blanks apart. The third is never narrower than "failed", so that tags
// stay in place when a member fails.
func membersText(members []memberStatus, detailed bool) string {
	var rows [][]string
	for _, m := range members {
		row := []string{printable(m.Name, ""), m.Addr.String(), fmt.Sprintf("%-6s", m.Status)}
		if detailed {
			row = append(row, "for "+m.lasted.Round(time.Second).String(),
				"version "+printable(m.Version, ""), fmt.Sprint("protocol ", m.Protocol))
		}
		rows = append(rows, append(row, printable(strings.Join(splitNUL(m.Tags), ","), "")))
	}
	return columns(rows)
}

// columns lays rows out at least four blanks apart, without trailing blanks.
func columns(rows [][]string) string {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], displayWidth(cell))
		}
	}

	var b strings.Builder
	for _, row := range rows {
		line := ""
		for i, cell := range row {
			line += cell + strings.Repeat(" ", widths[i]-displayWidth(cell)+4)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

// displayWidth is how many places s takes on a terminal: East Asian characters and emoji take two, marks that combine
// none (Unicode Standard Annex 11, in coarse ranges).
func displayWidth(s string) (width int) {
	for _, r := range s {
		switch {
		case unicode.In(r, unicode.Mn, unicode.Me):
		case isWide(r):
			width += 2
		default:
			width++
		}
	}
	return width
}

func isWide(r rune) bool {
	for _, wide := range [][2]rune{
		{0x1100, 0x115f}, {0x2e80, 0x303e}, {0x3041, 0xa4cf}, {0xac00, 0xd7a3}, {0xf900, 0xfaff}, {0xfe30, 0xfe6f},
		{0xff00, 0xff60}, {0xffe0, 0xffe6}, {0x1f300, 0x1faff}, {0x20000, 0x3fffd},
	} {
		if r >= wide[0] && r <= wide[1] {
			return true
		}
	}
	return false
}

// memberJSON is a member as Serf shows it; what follows the status is of -detailed.
type memberJSON struct {
	Name     string            `json:"name"`
	Addr     string            `json:"addr"`
	Port     uint16            `json:"port"`
	Tags     map[string]string `json:"tags"`
	Status   string            `json:"status"`
	For      string            `json:"for,omitempty"`
	Version  string            `json:"version,omitempty"`
	Protocol uint8             `json:"protocol,omitempty"`
}

func membersJSON(members []memberStatus, detailed bool) string {
	var list []memberJSON // null where there is none, as Serf has it
	for _, m := range members {
		shown := memberJSON{
			Name:   m.Name,
			Addr:   m.Addr.String(),
			Port:   m.Addr.Port(),
			Tags:   m.Tags.asMap(),
			Status: m.Status.String(),
		}
		if detailed {
			shown.For = m.lasted.Round(time.Second).String()
			shown.Version = m.Version
			shown.Protocol = m.Protocol
		}
		list = append(list, shown)
	}
	return toJSON(struct {
		Members []memberJSON `json:"members"`
	}{list})
}

// ---- text and JSON that are safe to show ----

// printable makes text from elsewhere safe to show: whatever is not graphic (escape sequences, bidi marks, broken
// UTF-8) is shown as in Go source, except for the characters in keep.
func printable(s, keep string) string {
	undo := []string{`\"`, `"`, `\\`, `\`}
	for _, r := range keep {
		undo = append(undo, strings.Trim(strconv.QuoteRune(r), "'"), string(r))
	}
	q := strconv.QuoteToGraphic(s)
	return strings.NewReplacer(undo...).Replace(q[1 : len(q)-1])
}

// toJSON lays v out as Serf does, indented by two blanks.
func toJSON(v any) string { return marshal(v, "  ") }

// toJSONLine lays v out on one line.
func toJSONLine(v any) string {
	// Newlines and tabs inside strings are escaped, so these stand between values.
	lines := strings.ReplaceAll(marshal(v, "\t"), "\t", "")
	return strings.NewReplacer(",\n", ", ", "\n", "").Replace(lines) + "\n"
}

func marshal(v any, indent string) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	if err := enc.Encode(v); err != nil {
		panic(err) // strings, numbers and maps of them always encode
	}

	// A terminal obeys DEL and the C1 controls, and bidi marks hide things. They stand inside strings only.
	var safe strings.Builder
	for _, r := range b.String() {
		if unicode.IsGraphic(r) || r == '\n' || r == '\t' {
			safe.WriteRune(r)
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&safe, `\u%04x`, u)
		}
	}
	return safe.String()
}

// ---- how events and answers are shown ----

// watchLine shows an event as a line of 'watch'.
func watchLine(at time.Time, ev Event, asJSON bool) string {
	if asJSON {
		return watchJSON(at, ev)
	}
	m := ev.Member
	what := fmt.Sprintf("%s %s (from %s)", ev.Name, ev.Payload, m.Name)
	if ev.kind < eventUser {
		what = fmt.Sprintf("%s %s %s %s", m.Name, m.Addr, m.Status, strings.Join(splitNUL(m.Tags), ","))
	}
	if ev.kind == eventUpdate {
		what += fmt.Sprintf(" (%s)", ev.changed)
	}
	line := fmt.Sprintf("%s %s: %s", at.Format(logTime), ev.kind, printable(what, ""))
	return strings.TrimRight(line, " ") + "\n"
}

func watchJSON(at time.Time, ev Event) string {
	when := at.Format(time.RFC3339Nano)
	m := ev.Member
	if ev.kind < eventUser {
		return toJSONLine(struct {
			Time   string            `json:"time"`
			Event  string            `json:"event"`
			Name   string            `json:"name"`
			Addr   string            `json:"addr"`
			Tags   map[string]string `json:"tags"`
			Status string            `json:"status"`
			Change string            `json:"changed,omitempty"`
		}{when, ev.kind.String(), m.Name, m.Addr.String(), m.Tags.asMap(), m.Status.String(), ev.changed})
	}
	return toJSONLine(struct {
		Time    string `json:"time"`
		Event   string `json:"event"`
		Name    string `json:"name"`
		Payload string `json:"payload"`
		LTime   uint64 `json:"ltime"`
		From    string `json:"from"`
	}{when, ev.kind.String(), ev.Name, string(ev.Payload), ev.LTime, m.Name})
}

// droppedLine says that the reader of 'watch' was too slow for that many lines.
func droppedLine(dropped int, asJSON bool) string {
	if dropped <= 0 {
		return ""
	}
	if asJSON {
		return toJSONLine(struct {
			Lost int `json:"lost"`
		}{dropped})
	}
	return fmt.Sprintf("(%d lines are missing here: this reader was too slow)\n", dropped)
}

// queryResult is what has come of a query; as JSON it has the two keys of Serf's.
type queryResult struct {
	Acks      []string
	Responses map[string]string // the output of handlers that did well
	Failures  map[string]string `json:",omitempty"` // and of those that failed
	waiting   map[string]bool   // asked, and no answer yet; true: those in Acks
	noAck     bool
}

func newQueryResult(noAck bool) *queryResult {
	return &queryResult{
		Responses: make(map[string]string),
		Failures:  make(map[string]string),
		waiting:   make(map[string]bool),
		noAck:     noAck,
	}
}

func (r *queryResult) ask(names []string) {
	for _, name := range names {
		r.waiting[name] = false
	}
}

// add adds what from says, and returns the lines to show for it.
func (r *queryResult) add(from string, reply reply, said string) string {
	text := ""
	if !r.noAck && !r.waiting[from] { // a reply may overtake the acknowledgement
		r.waiting[from] = true
		r.Acks = append(r.Acks, from)
		text = fmt.Sprintf("Ack from '%s'\n", from)
	}
	if reply == replyAck {
		return text
	}

	delete(r.waiting, from)
	line := fmt.Sprintf(" '%s': %s\n", from, strings.TrimSuffix(said, "\n"))
	switch reply {
	case replyDone:
		r.Responses[from] = said
		text += "Response from" + line
	case replyFailed:
		r.Failures[from] = said
		text += "Failed on" + line
	}
	return text
}

func (r *queryResult) totals() string {
	text := ""
	if !r.noAck {
		text = fmt.Sprintf("Total Acks: %d\n", len(r.Acks))
	}
	return text + fmt.Sprintf("Total Responses: %d\n", len(r.Responses))
}
