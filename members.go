// members.go: who is in the cluster and what is believed about each of them.
//
// Here live the member record, the one rule that decides between two claims,
// the table with its digest and its rings, and the events that a change of
// belief brings. It knows nothing of bytes on a wire, sockets or clocks.

package main

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits on what a member may carry; both are in bytes.
const (
	maxName = 128
	maxTags = 512
)

// Status is what is believed about a member. The order is the order of
// precedence among claims of one incarnation: the later one wins.
type Status uint8

const (
	StatusAlive   Status = iota + 1
	StatusSuspect        // unreachable for two observers; still shown as alive
	StatusLeaving        // only ever shown by a member about itself
	StatusFailed
	StatusLeft
	StatusPruned // left and to be forgotten; shown to nobody
)

// String returns the word that users see.
func (s Status) String() string {
	switch s {
	case StatusAlive, StatusSuspect:
		return "alive"
	case StatusLeaving:
		return "leaving"
	case StatusFailed:
		return "failed"
	case StatusLeft:
		return "left"
	case StatusPruned:
		return "pruned"
	}
	return "unknown"
}

// dead reports whether the member is believed to be gone.
func (s Status) dead() bool { return s >= StatusFailed }

// Tags are a member's key=value pairs, sorted by key and joined by NUL, so that
// a Member stays comparable and goes flat on the wire.
type Tags string

// MakeTags checks and packs tags. Keys must not be empty or hold '=' or NUL;
// all of it together may take 512 bytes.
func MakeTags(kv map[string]string) (Tags, error) {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(kv)) {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(kv[k], 0) {
			return "", fmt.Errorf("bad tag %q: a tag is key=value, and the key may not be empty", k+"="+kv[k])
		}
		pairs = append(pairs, k+"="+kv[k])
	}
	t := Tags(strings.Join(pairs, "\x00"))
	if len(t) > maxTags {
		return "", fmt.Errorf("tags take %d bytes, the limit is %d", len(t), maxTags)
	}
	return t, nil
}

// Pairs returns the tags as "key=value", sorted by key.
func (t Tags) Pairs() []string {
	if t == "" {
		return nil
	}
	return strings.Split(string(t), "\x00")
}

// Map returns the tags as a map; it is never nil.
func (t Tags) Map() map[string]string {
	kv := make(map[string]string)
	for _, p := range t.Pairs() {
		k, v, _ := strings.Cut(p, "=")
		kv[k] = v
	}
	return kv
}

// Member is one claim about one member.
type Member struct {
	Name string
	Addr netip.AddrPort
	// Incarnation orders the claims about a name. It starts as the Unix time of
	// the agent's start in milliseconds, and only the member itself raises it.
	Incarnation uint64
	// Born is the Unix time of the agent's start in milliseconds. It tells a
	// restart (another Born) from a refutation (the same one).
	Born   uint64
	Status Status
	Tags   Tags
}

// supersedes is the one rule that decides which of two claims about a name
// wins: the higher incarnation, then the worse status. Born, address and tags
// only make the order total, so that two instances started in the same
// millisecond cannot be believed differently for ever.
func (m Member) supersedes(old Member) bool {
	return cmp.Or(
		cmp.Compare(m.Incarnation, old.Incarnation),
		cmp.Compare(m.Born, old.Born),
		m.Addr.Compare(old.Addr),
		cmp.Compare(m.Status, old.Status),
		cmp.Compare(m.Tags, old.Tags),
	) > 0
}

// sameInstance reports whether both claims speak of one run of an agent.
func (m Member) sameInstance(o Member) bool { return m.Born == o.Born && m.Addr == o.Addr }

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

// EventKind is the kind of an event; its String is what handlers are told.
type EventKind uint8

const (
	EventJoin EventKind = iota + 1
	EventLeave
	EventFailed
	EventUpdate
	EventReap
	EventUser
)

// eventKindNames are Serf's words; the index is the EventKind.
var eventKindNames = [...]string{"", "member-join", "member-leave", "member-failed", "member-update", "member-reap", "user"}

func (k EventKind) String() string { return eventKindNames[k] }

// Event is one thing that handlers and the log are told: something that
// happened to Member, or (EventUser) a message that a user sent.
type Event struct {
	Kind   EventKind
	Member Member

	Name     string // of a user event
	Payload  []byte
	LTime    uint64 // Lamport time at which it was sent
	Coalesce bool   // of several that wait in a queue, the last will do
}

// rings is how many orderings of the members there are. Each member has one
// successor, its watcher, on each of them.
const rings = 4

// entry is what the table holds about one name.
type entry struct {
	Member
	pos  [rings]uint64 // place on each ring
	told Member        // what events last said; Status 0: nothing yet
	// lost marks a member that failed for me because I was cut off. It stays
	// local: exported, it would make everybody fail when a split heals.
	lost  bool
	since time.Duration // when it died, for reaping
	// reaped entries are invisible and keep an old claim from coming back
	// through a member that has not reaped yet.
	reaped bool
}

// visible is the status that users see.
func (e *entry) visible() Status {
	switch {
	case e.Status.dead():
		return e.Status
	case e.lost:
		return StatusFailed
	}
	return StatusAlive
}

// table holds all that is believed. Not safe for concurrent use.
type table struct {
	byName  map[string]*entry
	ordered []*entry        // by name, so that no map order can show
	ring    [rings][]*entry // those believed alive, in ring order
	digest  uint64          // XOR over the entries that are not reaped
	version uint64          // counts changes of the rings or of who is walked over
	shrunk  uint64          // counts those that took somebody off the rings
	events  []Event         // news that nobody has taken yet
}

func newTable() *table { return &table{byName: make(map[string]*entry)} }

func (t *table) get(name string) *entry { return t.byName[name] }

// apply takes claim m into the table when it wins over what is there, and
// reports whether it did. age is how long a dead member has been dead.
func (t *table) apply(now time.Duration, m Member, age time.Duration) bool {
	e := t.byName[m.Name]
	if e != nil && !m.supersedes(e.Member) {
		return false
	}
	if e == nil {
		e = &entry{}
		for i := range e.pos {
			e.pos[i] = ringHash(i, m.Name)
		}
		t.byName[m.Name] = e
		at, _ := slices.BinarySearchFunc(t.ordered, m.Name, byName)
		t.ordered = slices.Insert(t.ordered, at, e)
	} else if !e.reaped { // reap has taken it out of the digest
		t.digest ^= e.digest()
	}
	old, wasOn := e.Member, e.Status != 0 && !e.Status.dead()
	if m.Status.dead() && (!old.Status.dead() || old.Incarnation != m.Incarnation) {
		e.since = now - age
	}
	if !m.sameInstance(old) {
		e.lost = false
	}
	e.Member, e.reaped = m, false
	t.digest ^= e.digest()
	if on := !m.Status.dead(); on != wasOn {
		t.setOnRings(e, on)
	}
	if old.Status != m.Status {
		t.changed(m.Status == StatusSuspect || m.Status.dead())
	}
	t.announce(e)
	return true
}

// setLost marks or clears "failed for me".
func (t *table) setLost(e *entry, lost bool) {
	if e.lost == lost {
		return
	}
	e.lost = lost
	t.changed(lost)
	t.announce(e)
}

// changed notes that walks over the rings may now end elsewhere.
func (t *table) changed(shrunk bool) {
	t.version++
	if shrunk {
		t.shrunk++
	}
}

// announce tells the events that lead from what was told last to what is
// visible now. Per member they alternate: nobody joins twice without an end.
func (t *table) announce(e *entry) {
	was, is := e.told, e.Member
	is.Status = e.visible()
	if was == is {
		return
	}
	e.told = is
	tell := func(k EventKind, m Member) { t.events = append(t.events, Event{Kind: k, Member: m}) }
	alive := was.Status == StatusAlive
	switch {
	case is.Status == StatusAlive && alive && was.Born != is.Born:
		tell(EventFailed, was)
		tell(EventJoin, is)
	case is.Status == StatusAlive && alive:
		if was.Addr != is.Addr || was.Tags != is.Tags {
			tell(EventUpdate, is)
		}
	case is.Status == StatusAlive:
		tell(EventJoin, is)
	case is.Status == StatusFailed && alive:
		tell(EventFailed, is)
	case is.Status == StatusLeft && (alive || was.Status == StatusFailed):
		tell(EventLeave, is)
	case is.Status == StatusPruned && was.Status != 0 && was.Status != StatusPruned:
		if was.Status != StatusLeft {
			tell(EventLeave, is)
		}
		tell(EventReap, is)
	}
}

// reap hides the members that have been dead for longer than after and drops
// those that were hidden for as long again.
func (t *table) reap(now, after time.Duration) {
	keep := t.ordered[:0]
	for _, e := range t.ordered {
		dead := now - e.since
		if !e.Status.dead() || dead < after {
			keep = append(keep, e)
			continue
		}
		if !e.reaped {
			e.reaped = true
			t.changed(false)
			t.digest ^= e.digest()
			if e.told.Status != 0 && e.told.Status != StatusPruned {
				t.events = append(t.events, Event{Kind: EventReap, Member: e.told})
			}
			e.told = Member{}
		}
		if dead < 2*after {
			keep = append(keep, e)
		} else {
			delete(t.byName, e.Name)
		}
	}
	clear(t.ordered[len(keep):])
	t.ordered = keep
}

// snapshot copies what a user may see, sorted by name.
func (t *table) snapshot() []Member {
	ms := make([]Member, 0, len(t.ordered))
	for _, e := range t.ordered {
		if e.reaped || e.Status == StatusPruned {
			continue
		}
		m := e.Member
		m.Status = e.visible()
		ms = append(ms, m)
	}
	return ms
}

// failed counts the members that may come back, and all that could.
func (t *table) failed() (failed, total int) {
	for _, e := range t.ordered {
		if e.reaped || e.Status >= StatusLeft {
			continue
		}
		total++
		if e.Status == StatusFailed || e.lost {
			failed++
		}
	}
	return failed, total
}

// alive counts the members on the rings, oneself included.
func (t *table) alive() int { return len(t.ring[0]) }

func (t *table) setOnRings(e *entry, on bool) {
	for i := range t.ring {
		at := t.place(i, e)
		if on {
			t.ring[i] = slices.Insert(t.ring[i], at, e)
		} else {
			t.ring[i] = slices.Delete(t.ring[i], at, at+1)
		}
	}
}

// place is where e stands on ring i, or would stand.
func (t *table) place(i int, e *entry) int {
	at, _ := slices.BinarySearchFunc(t.ring[i], e, func(a, b *entry) int {
		if a.pos[i] != b.pos[i] {
			return cmp.Compare(a.pos[i], b.pos[i])
		}
		return strings.Compare(a.Name, b.Name)
	})
	return at
}

// skipped members are walked over on the rings: nobody there would pass on
// what it is told.
func (e *entry) skipped() bool { return e.Status == StatusSuspect || e.lost }

// watchers returns the members that watch e: on each ring the next neighbour
// that no earlier ring has given, since rings over few members coincide and
// would leave somebody with one watcher. Everybody else, where there are few.
func (t *table) watchers(e *entry) []*entry {
	var ws []*entry
	for i := range t.ring {
		t.walk(i, e, +1, func(w *entry) bool {
			if w.skipped() || slices.Contains(ws, w) {
				return true
			}
			ws = append(ws, w)
			return false
		})
	}
	return ws
}

// watched returns the members whose watcher e is. Suspects are among them: who
// accuses may die before the verdict. A watcher stands at most rings places
// behind the one it watches, not counting those that are walked over.
func (t *table) watched(e *entry) []*entry {
	var ps []*entry
	for i := range t.ring {
		seen := 0
		t.walk(i, e, -1, func(p *entry) bool {
			if !p.lost && !slices.Contains(ps, p) && slices.Contains(t.watchers(p), e) {
				ps = append(ps, p)
			}
			if !p.skipped() {
				seen++
			}
			return seen < rings
		})
	}
	return ps
}

// walk visits ring i from e's neighbour on, in direction dir, until visit
// returns false or all others were seen.
func (t *table) walk(i int, e *entry, dir int, visit func(*entry) bool) {
	ring := t.ring[i]
	at := t.place(i, e)
	for step := 1; step <= len(ring); step++ {
		o := ring[((at+dir*step)%len(ring)+len(ring))%len(ring)]
		if o != e && !visit(o) {
			return
		}
	}
}

func byName(e *entry, name string) int { return strings.Compare(e.Name, name) }

// digest is this entry's part of the table's digest. A suspect counts as
// alive: suspicion is short and settles itself, it is not worth a repair. The
// address is in it because of two instances started in the same millisecond:
// whoever knows the one would never learn of the other.
func (e *entry) digest() uint64 {
	s := e.Status
	if s == StatusSuspect {
		s = StatusAlive
	}
	ip := e.Addr.Addr().As16()
	hi, lo := binary.BigEndian.Uint64(ip[:8]), binary.BigEndian.Uint64(ip[8:])
	return mix(e.pos[0] ^ mix(e.Incarnation^uint64(s)<<56) ^ mix(lo^mix(hi^uint64(e.Addr.Port()))))
}

// ringHash places a name on a ring. FNV alone leaves similar names (web1, web2)
// near each other on every ring, so its result is mixed.
func ringHash(ring int, name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte{byte(ring)})
	h.Write([]byte(name))
	return mix(h.Sum64())
}

// mix is a 64-bit finalizer: multiply by an odd constant, fold the high half
// of the 128-bit product into the low one.
func mix(x uint64) uint64 {
	hi, lo := bits.Mul64(x^0x9e3779b97f4a7c15, 0xd6e8feb86659fd93)
	return hi ^ lo
}
