// members.go: who is in the cluster and what is believed about each of them.
//
// Here live the member record, what is said of members (update), the one rule that decides between two claims, the
// table with its digest and its rings, and the events that a change of belief brings. It knows nothing of bytes on a
// wire, sockets or clocks.

package main

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
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

// Status is what is believed about a member. Among claims of one incarnation the later status wins.
type Status uint8

const (
	statusAlive   Status = iota + 1
	statusSuspect        // unreachable for two observers; still shown as alive
	statusLeaving        // only ever shown by a member about itself
	statusFailed
	statusLeft
	statusPruned // left and to be forgotten; shown to nobody
)

// statusNames are the words that users see; the index is the Status.
var statusNames = [...]string{"unknown", "alive", "alive", "leaving", "failed", "left", "pruned"}

func (s Status) String() string { return statusNames[s] }

// isDead reports whether the member is believed to be gone.
func (s Status) isDead() bool { return s >= statusFailed }

// Tags are a member's key=value pairs, sorted by key and joined by NUL, so that a Member stays comparable and
// goes flat on the wire.
type Tags string

// makeTags checks and packs tags. Keys must not be empty or hold '=' or NUL; all together may take 512 bytes.
func makeTags(kv map[string]string) (Tags, error) {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(kv)) {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(kv[k], 0) {
			return "", fmt.Errorf("bad tag %q: a tag is key=value, and the key may not be empty or hold a '='", k+"="+kv[k])
		}
		pairs = append(pairs, k+"="+kv[k])
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
	// Incarnation orders the claims about a name. It starts as Born, and only the member itself raises it: to
	// refute a claim, or to change its tags.
	Incarnation uint64
	// Instance tells one run of an agent from all others; see birth.
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

// sameInstance reports whether m and o are about one run of an agent.
func (m Member) sameInstance(o Member) bool { return m.Name == o.Name && m.Instance == o.Instance }

// instanceRandomBits is how many random bits stand below the milliseconds of a birth.
const instanceRandomBits = 14

// newInstanceID makes the number of a run that starts at unixMs. Later starts are higher, so that a restart
// supersedes its former self without any file; the random bits tell apart two that start in one millisecond.
func newInstanceID(unixMs, random uint64) uint64 {
	return unixMs<<instanceRandomBits | random>>(64-instanceRandomBits)
}

// supersedes is the one rule that decides which of two claims about a name wins: the higher incarnation, then
// the worse status. The rest makes the order total, so that no two members can believe forged claims differently.
func (m Member) supersedes(old Member) bool {
	return cmp.Or(
		cmp.Compare(m.Incarnation, old.Incarnation),
		cmp.Compare(m.Instance, old.Instance),
		cmp.Compare(m.Status, old.Status),
		m.Addr.Compare(old.Addr),
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
	eventAnswer // to a query of this agent: for whoever asked, not for handlers
)

// eventNames are Serf's words for the kinds; the index is the eventKind, where 0 is no event: a member is there.
var eventNames = [...]string{"member", "member-join", "member-leave", "member-failed", "member-update", "member-reap", "user", "query"}

func (k eventKind) String() string { return eventNames[k] }

// update is one claim about a member, or (Name set) a user event or query of Member.
type update struct {
	Member   Member
	Age      uint64 // milliseconds since the member died, or the event was sent
	Name     string
	Payload  []byte
	LTime    uint64 // Lamport time at which it was sent
	Coalesce bool   // of several that wait in a queue, the last will do
	Timeout  uint32 // of a query: milliseconds in which it wants answers
}

// key tells updates apart, and orders them: members by name, then (no name begins so) user events by their time.
func (u *update) key() string {
	if u.Name == "" {
		return u.Member.Name
	}
	return fmt.Sprintf("\xff%016x%016x", u.LTime, ringHash(rings, u.Member.Name+"\x00"+u.Name+"\x00"+string(u.Payload)))
}

// Event is one thing that handlers, the log and watchers are told: something that happened to Member, what a user
// sent, whose sender is Member, or (eventAnswer) the Payload that came back from there.
type Event struct {
	kind eventKind
	update
	id    uint32 // eventQuery: the asker's number of it; eventAnswer: of my query
	reply reply  // eventAnswer
}

// validatePayload returns an error that says why a user event or query is refused.
func validatePayload(what, name string, payload []byte) error {
	if size := len(name) + len(payload); size > maxPayload {
		return fmt.Errorf("%s name and payload take %d bytes, the limit is %d", what, size, maxPayload)
	} else if name == "" {
		return fmt.Errorf("the %s has no name", what)
	}
	return nil
}

const (
	// rings is how many orderings of the members there are. Each member has one successor, its watcher, on each.
	rings = 4
	// maxWalk bounds how many members are walked over for one neighbour: forged suspects would else make every
	// walk as long as the table. Of real suspects so many in a row are never seen.
	maxWalk = 64
	// maxEvents is how many user events are remembered.
	maxEvents = 128
)

// claim is what is believed about a name, with its places on the rings. It never changes, so that the tables
// of a simulation can share it: ten thousand of them fit into memory.
type claim struct {
	Member
	pos [rings]uint64
}

// entry is what the table holds about one name.
type entry struct {
	*claim
	announced Status // as which events last showed it; 0: not yet, or not any more
	// isolated marks a member that failed for me because I was cut off. It stays local: exported, it would make
	// everybody fail when a split heals.
	isolated bool
	// reaped entries keep an old claim from coming back through a member that has not reaped yet.
	reaped bool
	since  time.Duration // when it came, or died
	known  time.Duration // when the name was first heard of, on the caller's clock
	state  *peerState    // the protocol's, with this instance; another one starts anew
}

// displayStatus is the status that users see; 0: they see nothing.
func (e *entry) displayStatus() Status {
	switch {
	case e.reaped || e.Status == statusPruned:
		return 0
	case e.isolated && !e.Status.isDead():
		return statusFailed
	case e.Status == statusSuspect: // that is short, and settles itself
		return statusAlive
	}
	return e.Status
}

// isSkipped members are walked over on the rings: nobody there would pass on what it is told.
func (e *entry) isSkipped() bool { return e.Status != statusAlive || e.isolated }

// table holds all that is believed. Not safe for concurrent use.
type table struct {
	ordered []*entry        // by name, so that no map order can show
	ring    [rings][]*entry // those believed alive, in ring order
	digest  uint64          // XOR over the entries that are not reaped
	highest uint64          // incarnation of all
	version uint64          // counts changes of the rings or of who is walked over
	shrunk  uint64          // the version that last took somebody off
	failed  int             // members that may come back, of
	total   int             // all that have neither left nor been forgotten
	events  []Event         // news that nobody has taken yet
}

// index returns where name is in ordered, or would be.
func (t *table) index(name string) (int, bool) {
	return slices.BinarySearchFunc(t.ordered, name, func(e *entry, name string) int { return strings.Compare(e.Name, name) })
}

func (t *table) get(name string) *entry {
	if at, ok := t.index(name); ok {
		return t.ordered[at]
	}
	return nil
}

// ended reports whether m's run is believed to have ended.
func (t *table) ended(m Member) bool {
	e := t.get(m.Name)
	return e == nil || e.Instance != m.Instance || e.Status.isDead()
}

// apply takes claim m into the table when it wins over what is there, and returns its entry then, else nil.
// age is how long a dead member has been dead.
func (t *table) apply(now time.Duration, m Member, age time.Duration) *entry {
	e := t.get(m.Name)
	switch {
	case e != nil && !m.supersedes(e.Member), e == nil && len(t.ordered) >= maxMembers && !t.makeRoom():
		return nil
	case e == nil: // as if it had been here and was forgotten
		e = &entry{claim: &claim{Member: Member{Name: m.Name, Status: statusPruned}}, reaped: true}
		for i := range e.pos {
			e.pos[i] = ringHash(i, m.Name)
		}
		at, _ := t.index(m.Name)
		t.ordered = slices.Insert(t.ordered, at, e)
	}
	t.highest = max(t.highest, m.Incarnation)
	t.change(e, func() {
		if e.Instance != m.Instance {
			e.isolated, e.state = false, nil
		}
		if m.Status.isDead() && (!e.Status.isDead() || e.Incarnation != m.Incarnation) {
			e.since = now - age
		}
		returned := e.Status.isDead() || e.Instance != m.Instance
		if !m.Status.isDead() && returned {
			e.since = now
		}
		e.claim, e.reaped = &claim{m, e.pos}, false
	})
	return e
}

// setIsolated marks or clears "failed for me".
func (t *table) setIsolated(e *entry, lost bool) {
	if e.isolated != lost {
		t.change(e, func() { e.isolated = lost })
	}
}

// change lets f change e, and brings about what follows: in the sums, on the rings, and as events.
func (t *table) change(e *entry, f func()) {
	was := *e
	t.count(e, -1)
	f()
	t.count(e, +1)
	if e.Status.isDead() != was.Status.isDead() {
		for i, ring := range t.ring {
			if at, on := t.ringIndex(i, e); on {
				t.ring[i] = slices.Delete(ring, at, at+1)
			} else {
				t.ring[i] = slices.Insert(ring, at, e)
			}
		}
	}
	if e.Status != was.Status || e.Instance != was.Instance || e.isolated != was.isolated { // walks over the rings may end elsewhere
		t.version++
		if e.isSkipped() {
			t.shrunk = t.version
		}
	}
	t.announce(e, was.with(e.announced))
}

// count adds e to the sums over the table, or takes it out.
func (t *table) count(e *entry, by int) {
	if e.reaped {
		return
	}
	t.digest ^= e.digest()
	if e.Status < statusLeft {
		t.total += by
	}
	if e.displayStatus() == statusFailed {
		t.failed += by
	}
}

// makeRoom reaps the member that has been dead for longest: names that nobody needs must keep no newcomer out.
func (t *table) makeRoom() bool {
	before, oldest := len(t.ordered), never
	for _, e := range t.ordered {
		if e.Status.isDead() {
			oldest = min(oldest, e.since)
		}
	}
	t.reap(oldest, 0)
	return len(t.ordered) < before
}

// announce tells the events that lead from what was shown last to what is visible now. Per member they
// alternate: nobody joins twice without an end.
func (t *table) announce(e *entry, was Member) {
	is := e.with(e.displayStatus())
	if was.Status == statusLeft && is.Status == statusFailed {
		is.Status = statusLeft // no event tells of it, or it would leave twice
	}
	e.announced = is.Status
	tell := func(k eventKind, m Member) { t.events = append(t.events, Event{kind: k, update: update{Member: m}}) }
	if was.Status == statusAlive && is.Status == statusAlive && was.Instance != is.Instance { // nobody noticed the end
		was.Status = statusFailed
		tell(eventFailed, was)
	}
	switch {
	case is.Status == statusAlive && was.Status != statusAlive:
		tell(eventJoin, is)
	case is.Status == statusAlive && (was.Addr != is.Addr || was.Tags != is.Tags):
		tell(eventUpdate, is)
	case is.Status == statusFailed && was.Status == statusAlive:
		tell(eventFailed, is)
	case e.Status >= statusLeft && (was.Status == statusAlive || was.Status == statusFailed):
		was.Status = statusLeft
		tell(eventLeave, is.with(statusLeft))
	}
	if is.Status == 0 && was.Status != 0 {
		tell(eventReap, is.with(was.Status))
	}
}

// reap hides the members that have been dead for longer than after, and drops them after as long again.
func (t *table) reap(now, after time.Duration) {
	t.ordered = slices.DeleteFunc(t.ordered, func(e *entry) bool {
		if !e.Status.isDead() || now-e.since < after {
			return false
		}
		t.change(e, func() { e.reaped = true })
		return now-e.since >= 2*after
	})
}

// aliveCount counts the members on the rings, oneself included.
func (t *table) aliveCount() int { return len(t.ring[0]) }

// ringIndex is where e stands on ring i, or would stand, and whether it does.
func (t *table) ringIndex(i int, e *entry) (int, bool) {
	return slices.BinarySearchFunc(t.ring[i], e, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.pos[i], b.pos[i]), strings.Compare(a.Name, b.Name))
	})
}

// watchers returns the members that watch e: on each ring the next neighbour that no earlier ring has given,
// since rings over few members coincide and would leave somebody with one watcher. Everybody else, where
// there are few.
func (t *table) watchers(e *entry) []*entry {
	ws := make([]*entry, 0, rings)
	for i := range t.ring {
		for w := range t.neighbours(i, e, +1) {
			if !w.isSkipped() && !slices.Contains(ws, w) {
				ws = append(ws, w)
				break
			}
		}
	}
	return ws
}

// watched returns the members whose watcher e is. Suspects are among them: who accuses may die before the
// verdict.
func (t *table) watched(e *entry) (ps []*entry) {
	for i := range t.ring {
		for p := range t.neighbours(i, e, -1) {
			if !p.isolated && !slices.Contains(ps, p) && slices.Contains(t.watchers(p), e) {
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
		ring, left := t.ring[i], rings
		at, _ := t.ringIndex(i, e)
		for step := 1; step < len(ring) && step <= maxWalk && left > 0; step++ {
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

// digest is this entry's part of the table's digest. A suspicion is not worth a repair: it counts as alive does.
func (e *entry) digest() uint64 {
	return mix(e.pos[0] ^ mix(e.Incarnation^uint64(max(e.Status, statusSuspect))<<60))
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

// bufferedEvent is one remembered user event, as it travels. Its key orders it, see update.key.
type bufferedEvent struct {
	update
	key  string
	sent time.Duration // on the caller's clock, as far as is known
}

// eventBuffer is the latest user events. Everybody who has heard the same ones remembers the same ones, so they
// can be part of the digest.
type eventBuffer struct {
	lamport uint64          // the highest time heard of
	recent  []bufferedEvent // in the order of their keys
	digest  uint64
}

// add remembers ev; false: it was heard before, or is too old to be told from one that was.
func (m *eventBuffer) add(ev bufferedEvent) bool {
	m.lamport = max(m.lamport, ev.LTime)
	byKey := func(o bufferedEvent, key string) int { return strings.Compare(o.key, key) }
	at, heard := slices.BinarySearchFunc(m.recent, ev.key, byKey)
	if heard || at == 0 && len(m.recent) == maxEvents {
		return false
	}
	m.recent = slices.Insert(m.recent, at, ev)
	m.digest ^= ringHash(rings, ev.key)
	if len(m.recent) > maxEvents {
		m.digest ^= ringHash(rings, m.recent[0].key)
		m.recent = slices.Delete(m.recent, 0, 1)
	}
	return true
}
