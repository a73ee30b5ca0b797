// gossip.go: the protocol as a pure state machine, and the loop that owns it.
//
// A node takes the time and what arrived, and gives back outputs: packets, what it wants done over TCP, events,
// log lines, and when it wants to be woken. It reads no clock, socket or global random source, starts no
// goroutine and holds no lock. Which claim wins is decided in members.go; how TCP works is the affair of rpc.go.
//
// In the order in which a datagram meets them:
//
//	constants       the protocol's times and bounds
//	messages        what travels: header, claims and events
//	codec           gob, made fit for datagrams
//	seal            encryption, and for whom a datagram is
//	replay window   each datagram counts once
//	awake time      the clock that all deadlines run on, and rates
//	node            inputs and outputs, the verbs that its parts use
//	requests        what waits for an answer
//	datagrams in    what comes, and what it tells
//	broadcasts      how news spreads
//	anti-entropy    comparing tables with a peer
//	joining         the seeds
//	identity        this node's own name, address and tags
//	heartbeats      the watchers and the watched
//	probes          how a lateness becomes a verdict
//	isolation       is it this node? and pings to the failed
//	queries         questions to members, and their answers
//	the loop        the one goroutine that owns all this, with UDP

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	ms    = time.Millisecond
	never = time.Duration(math.MaxInt64)
)

// The protocol's times and bounds. They were settled in simulation: the
// scenarios in sim_test.go are the measurements.
const (
	floodBatch, floodRate = 2 * ms, 200 // packets a second
	repairEvery           = time.Second
	repairBurst           = 4 // at once, or of a hundred who join at once some would wait a second for what they missed
	remindEvery           = 200 * ms
	resendAfter           = 50 * ms         // the first time; each wait is twice as long
	answerFor             = 3 * time.Second // a question's answer counts for so long
	leaveFor              = time.Second
	seedsMax, warnEvery   = 30 * time.Second, 10 * time.Minute
	lateBy                = 100 * ms // how much later than planned a wake-up may count

	maxDatagram, maxFrame = 1400, 32 << 10
	maxQueue              = 4096 // claims and events that wait to be flooded
	maxQuestions          = 2 * maxMembers
	maxQueries, maxHeard  = 64, 1 << 14 // of one's own at a time, and those of others
	replyFor              = time.Minute // a reply is sent again for so long at most
	heardFor              = time.Hour   // a query that arrives again is known for so long at most
	postRate, postBurst   = 64000, 64   // letters a second, and in one go: a thousand at once would be lost
	maxInputs             = 1024        // that wait for the loop; more datagrams are lost
	drainFor              = 20 * ms     // inputs may keep the loop from its tick
	writeFor              = 20 * ms     // what the socket does not take by then is lost, as UDP may be
	linesRate, linesBurst = 50, 2000    // log lines about members: a second, and at once

	// Bystanders whose addresses somebody forged get, all together, so much a second, and so many queries.
	strangerRate, strangerBurst = 20, 60
	askRate, askBurst           = 2000, 1000
)

var (
	errMalformed = errors.New("sent a malformed message")
	errMyself    = errors.New("that is this node itself")
	errWait      = errors.New("whether the name is taken is being found out")
	errTaken     = errors.New("is taken")
	errNobody    = errors.New("nobody is asked: no living member is as the query wants it")
	errStopped   = errors.New("the agent is stopping")
)

// The detector's times and bounds; a probe counts from its start.
const (
	beatEvery    = 500 * ms // one heartbeat, to one watcher at a time
	overdueAfter = 100 * ms // past its promise
	newGrace     = 500 * ms
	linkCount    = 2        // watchers that hold a watch link
	linkAfter    = 100 * ms // while many join, rings change all the time

	askAfter    = 100 * ms // a second ping, and helpers
	askOnce     = 300 * ms // more: those that have not voted
	helpFor     = 350 * ms // a helper's vote
	probeFor    = 600 * ms // the end of a round
	suspectFor  = 1500 * ms
	stallFor    = 10 * time.Second
	stallRound  = time.Second
	aloneAfter  = 3 * time.Second
	lastCallGap = 150 * ms
	lastCallFor = 900 * ms
	retryRate   = 2.0 // pings a second, times the failed share of the table
	maxProbes   = 256
)

// ---- messages ----

// kind says what a message is. The heartbeat is 0, which gob leaves out.
type kind uint8

const (
	kHeartbeat kind = iota
	kPing           // Target: answer me
	kAck            // I answer; Seq is the question's
	kCheck          // look at Target for me
	kVote           // what I saw of Target
	kFlood          // carries claims and user events
	kQuery          // carries a query: answer it if you can
	kReply          // to a kQuery
	kLook           // first frame of a session: who are you
	kLink           // first frame: an idle link that tells of my death
	kExchange       // first frame: let us compare tables
	kWelcome        // answer to a first frame
	kTable          // a piece of the table
	kBye            // this link ends without anybody having died
)

// reply says what a member does about a query.
type reply uint8

const (
	replyNone    reply = iota // none will come any more
	replyHeard                // it has the query
	replyNothing              // it has no handler for it
	replyDone                 // the output of its handler
	replyFailed               // the same, and it failed: the first line says how
)

// head opens every datagram and every frame between agents. gob leaves out zeros, so one struct serves all kinds.
type head struct {
	Kind        kind
	From        string
	Incarnation uint64
	Raised      uint64 // Incarnation minus Born; 0 until the member raised it
	Number      uint64 // of this datagram among all of the sender's run
	Digest      uint64
	Promise     uint32 // heartbeat: milliseconds until the next one to you
	Seq         uint32 // of a question (any but a check wants a kAck), and of its answer
	Query       uint32 // the asker's number of a query
	Target      string // whom a ping, check or vote is about; where a piece of a table ends, and of the last one nothing
	Verdict     verdict
	Reply       reply
	More        bool // kTable: another piece follows
}

func (h *head) born() uint64 { return h.Incarnation - h.Raised }

// verdict is what one observer saw of a target, in rising weight as evidence that somebody is there.
type verdict uint8

const (
	vNone        verdict = iota
	vUnreachable         // nothing at all
	vRefused             // the host is there, the process is not
	vSilent              // the kernel accepts, the process does not answer
	vAlive
)

// ---- codec ----

// codec encodes and decodes messages with one gob encoder and one decoder that have seen the type
// definitions, so that what travels is bare values in any order and with any loss. Safe for concurrent use.
type codec struct {
	mu  sync.Mutex
	buf bytes.Buffer
	enc *gob.Encoder
	in  bytes.Reader
	dec *gob.Decoder
	ids map[reflect.Type][]byte // the type ids as they stand in a message: two bytes, for those of 64 to 127
}

// wire is the process's codec. gob's type ids depend on the order in which the process touches types, so it
// is made before anything else can use gob.
var wire = newCodec(&head{}, &update{}, &request{}, &answer{})

func newCodec(messages ...any) *codec {
	c := &codec{ids: make(map[reflect.Type][]byte)}
	c.enc, c.dec = gob.NewEncoder(&c.buf), gob.NewDecoder(&c.in)
	for _, m := range messages {
		c.in.Reset(c.encode(nil, m)) // the first time with the type's definition
		c.dec.Decode(m)
		c.ids[reflect.TypeOf(m)] = c.encode(nil, m)[1:3] // length, then id
	}
	return c
}

// encode appends the encoding of m, a pointer to a message, and of the updates that follow it to dst.
func (c *codec) encode(dst []byte, m any, us ...update) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Reset()
	err := c.enc.Encode(m)
	for i := range us {
		err = cmp.Or(err, c.enc.Encode(&us[i]))
	}
	if err != nil {
		panic(err) // flat structs always encode
	}
	return append(dst, c.buf.Bytes()...)
}

// decode decodes the message that opens b into m, which must be fresh, and returns what follows it. It hands
// gob only what it can do no harm with: a message of the wanted type, of a length that is there. New
// definitions, which could grow the decoder without bound, do not get in.
func (c *codec) decode(b []byte, m any) (rest []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errMalformed, r)
		}
	}()
	size, n := 0, 0 // n: of the length itself, as gob writes it
	switch {
	case len(b) > 0 && b[0] < 128:
		size, n = int(b[0]), 1
	case len(b) > 1 && b[0] == 0xff:
		size, n = int(b[1]), 2
	case len(b) > 2 && b[0] == 0xfe: // more than a frame holds
		size, n = int(binary.BigEndian.Uint16(b[1:])), 3
	}
	if n == 0 || size > len(b)-n || !bytes.HasPrefix(b[n:], c.ids[reflect.TypeOf(m)]) {
		return nil, errMalformed
	}
	c.in.Reset(b[:n+size])
	if err := c.dec.Decode(m); err != nil || c.in.Len() > 0 {
		return nil, errMalformed
	}
	return b[n+size:], nil
}

// decodeAll decodes updates up to the end of b.
func (c *codec) decodeAll(b []byte) (us []update, err error) {
	for len(b) > 0 && err == nil {
		var u update
		b, err = c.decode(b, &u)
		us = append(us, u)
	}
	return us, err
}

// ---- seal ----

// door closes and opens what travels between ports of one kind. With keys everything is authenticated before anything
// is decoded, together with for whom it is, so that what was said to one run of a member cannot be played to another.
type door struct {
	cluster string
	keys    [][]byte // of 32 bytes: the first one seals, any opens
	kind    byte
	other   uint16 // the agent's port of the other kind
}

func (d *door) keyed() bool { return len(d.keys) > 0 }

// tag tells in clear for whom something is, by a hash.
func (d *door) tag(whom string) []byte {
	h := fnv.New32a()
	io.WriteString(h, d.cluster+"\x00"+whom)
	return h.Sum(nil)
}

// aead is AES-256-GCM under a key that is derived from key for whom alone (HKDF-Expand, RFC 5869), in this cluster.
// Nonces are random and have 96 bits, which is enough for 2^32 messages under one key (NIST SP 800-38D, 8.3): one run
// of a member, the pings to one name, or one frame get fewer. For anybody else than whom it does not open.
func (d *door) aead(key []byte, whom string) cipher.AEAD {
	derived, _ := hkdf.Expand(sha256.New, key, d.cluster+"\x00"+whom, len(key))
	block, _ := aes.NewCipher(derived)
	a, _ := cipher.NewGCMWithRandomNonce(block)
	return a
}

// close appends to dst what data becomes for whom; open undoes that.
func (d *door) close(dst, data []byte, whom string) []byte {
	if dst = append(dst, d.tag(whom)...); !d.keyed() {
		return append(dst, data...)
	}
	return d.aead(d.keys[0], whom).Seal(dst, nil, data, nil)
}

func (d *door) open(b []byte, whom string) ([]byte, error) {
	if len(b) < 4 || !bytes.Equal(b[:4], d.tag(whom)) {
		return nil, errNotForMe
	}
	if b = b[4:]; !d.keyed() {
		return b, nil
	}
	for _, k := range d.keys {
		if data, err := d.aead(k, whom).Open(nil, nil, b, nil); err == nil {
			return data, nil
		}
	}
	return nil, errOtherKey
}

const protocolVersion = 4

// datagramFor is for whom a datagram is: a run of name, or (born 0) any.
func datagramFor(name string, born uint64) string {
	return "datagram " + strconv.FormatUint(born, 36) + " " + name
}

// closeDatagram makes a datagram of data for that run of name, or any: only a ping is.
func (d *door) closeDatagram(data []byte, name string, born uint64) []byte {
	return d.close(append(make([]byte, 0, 64+len(data)), protocolVersion), data, datagramFor(name, born))
}

// openDatagram opens one; errNotForMe: of another cluster, to who had the address before, or to a former run.
func (d *door) openDatagram(b []byte, name string, born uint64) (data []byte, anyRun bool, err error) {
	if len(b) == 0 || b[0] != protocolVersion {
		return nil, false, errVersion
	} else if len(b) > maxDatagram {
		return nil, false, errors.New("sent a datagram that is too long")
	}
	if data, err = d.open(b[1:], datagramFor(name, born)); errors.Is(err, errNotForMe) {
		data, err = d.open(b[1:], datagramFor(name, 0))
		anyRun = true
	}
	return data, anyRun, err
}

// ---- replay window ----

// window tells which of the numbers that a run gives its datagrams have counted: none counts twice (RFC 4303,
// section 3.4.3). What is windowSize behind the highest counts for nothing.
type window struct {
	top  uint64
	seen uint64 // a bit for each number, from top down
}

func (w *window) take(number uint64) bool {
	if number > w.top {
		w.seen, w.top = w.seen<<(number-w.top), number
	}
	bit := uint64(1) << (w.top - number) // 0 when it is too far behind
	fresh := number > 0 && bit > 0 && w.seen&bit == 0
	w.seen |= bit
	return fresh
}

// lower makes number the highest that has counted.
func (w *window) lower(number uint64) {
	if number+windowSize < w.top {
		*w = window{number, ^uint64(0)}
	}
}

// ---- awake time ----

// clock is awake time, which all deadlines run on, beside the caller's.
type clock struct {
	real    time.Duration // the caller's, at the last entry
	now     time.Duration // awake
	planned time.Duration // for how long nothing falls due
}

// advance runs the awake clock. A process that was stopped would blame everybody else for its own silence, so
// a gap counts for no more than the planned wait and a little.
func (c *clock) advance(now time.Duration) {
	c.now += max(min(now-c.real, c.planned+lateBy), 0)
	c.real = now
}

// wakeAt asks to be woken at awake time t.
func (c *clock) wakeAt(t time.Duration) { c.planned = min(c.planned, max(t-c.now, 0)) }

// bucket bounds a rate; its tokens may fall below 0, and then it is empty.
type bucket struct {
	tokens float64
	at     time.Duration
}

// fill lets rate tokens a second run in, and burst of them lie.
func (b *bucket) fill(now time.Duration, rate, burst float64) *bucket {
	if b.at == 0 {
		b.tokens = burst
	}
	b.tokens, b.at = min(b.tokens+rate*(now-b.at).Seconds(), burst), now
	return b
}

// take takes a token, if there is one.
func (b *bucket) take() bool {
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// ---- node ----

type packet struct {
	to   Member // that run, or (Born 0) any of that name
	data []byte
}

// outputs is all that a node wants done, in order.
type outputs struct {
	packets   []packet
	looks     []Member // look at these by TCP
	links     []Member // all watch links that shall stand; nil: no change
	exchanges []Member // compare tables with these
	events    []Event
	logs      []string
	resolve   bool          // look the seeds up and try them all
	wake      time.Duration // when to tick next, on the caller's clock
	left      bool          // the leave is done
	fatal     error         // the node must not go on
}

// nodeConfig is what a node is born with.
type nodeConfig struct {
	member    Member // its Incarnation is its Born: see birth
	seeds     []string
	retryMax  int // failed rounds of joining the seeds; 0: for ever
	reapAfter time.Duration
	replay    bool // deliver user events of before this agent's time
	random    [32]byte
}

// node is one member's view of the cluster and all its protocol state.
type node struct {
	nodeConfig
	clock
	rng       *rand.Rand
	t         *table
	self      *entry
	out       outputs
	number    uint64 // of the last datagram
	questions questions
	ring      ring
	detector  detector
	spread    spread
	repair    repair
	joining   joining
	own       ownName
	queries   queries
}

// newNode makes a node of cfg; now is the caller's clock.
func newNode(cfg nodeConfig, now time.Duration) *node {
	n := &node{nodeConfig: cfg, rng: rand.New(rand.NewChaCha8(cfg.random)), t: &table{}}
	n.clock = clock{real: now, now: time.Second} // so that 0 can mean never
	cfg.member.Status = statusAlive
	n.self = n.t.apply(n.now, cfg.member, 0)
	n.self.known = now // what a former run of this name has sent is over
	n.ring = ring{nextBeat: n.now + n.jitter(beatEvery), linkAt: never}
	n.detector.heard = n.now
	n.detector.retry = bucket{n.rng.Float64(), n.now} // or all members ping at the same moments
	return n
}

// enter is the one way in: it runs the clock to now, then input, which may call whatever is told to a node.
func (n *node) enter(now time.Duration, input func(*node)) {
	n.clock.advance(now)
	input(n)
}

// tick does all that has fallen due and returns what the node wants done. The caller must have handed in all
// that had arrived before (a queued heartbeat acquits its sender).
func (n *node) tick(now time.Duration) outputs {
	n.clock.advance(now)
	n.clock.planned = time.Second // at the latest: who is alone has no heartbeats to wake it, and dead to forget
	n.questions.step(n)
	if n.own.leaving == 0 {
		n.ring.refresh(n)
		n.ring.step(n)
		n.detector.step(n)
		n.repair.step(n)
		n.joining.step(n)
		n.queries.step(n)
		if n.ring.seen != n.t.version {
			n.ring.refresh(n)
			n.wakeAt(n.now) // retries follow the new ring in the next tick
		}
	} else if n.wakeAt(n.own.leaving); len(n.questions.open) == 0 || n.now >= n.own.leaving {
		n.out.left = true
	}
	n.spread.flush(n)
	o := n.out
	o.events = append(o.events, n.t.events...)
	o.wake = n.real + n.planned
	n.out, n.t.events = outputs{}, nil
	return o
}

func (n *node) jitter(d time.Duration) time.Duration { return time.Duration(n.rng.Int64N(int64(d))) }

func (n *node) logf(format string, a ...any) {
	n.out.logs = append(n.out.logs, fmt.Sprintf(format, a...))
}

// plausible is the one rule about numbers from outside: no incarnation and no Lamport time is far above all
// that is known, or one forged datagram with the highest number of all would end joins, or events, for good.
// What is known at the start may be of 1970, for want of a clock; the limit grows, so that it can be exceeded.
func (n *node) plausible(number, known uint64) bool {
	const floor, room = 1 << 56, 1 << 48 // as births: the year 2109, 198 days
	return number <= max(known, floor)+room+uint64(n.now/ms)<<birthBits
}

// ---- the verbs ----

func (n *node) head(k kind) head {
	h := head{Kind: k, From: n.self.Name, Incarnation: n.self.Incarnation, Raised: n.self.Incarnation - n.self.Born}
	switch k {
	case kHeartbeat, kPing, kAck, kExchange, kWelcome: // a ping's makes room for that of the answer, which is never larger
		h.Digest = n.digest()
	}
	return h
}

// digest covers the table and the remembered user events.
func (n *node) digest() uint64 { return n.t.digest ^ n.spread.events.digest }

// affords reports whether m may be sent something that it has not asked for, a message of kind k.
func (n *node) affords(m Member, k kind) bool {
	if e := n.t.get(m.Name); e != nil && e.Addr == m.Addr && e.deal().met {
		return true
	}
	if k == kQuery {
		return n.queries.strangers.fill(n.now, askRate, askBurst).take()
	}
	return n.detector.strangers.fill(n.now, strangerRate, strangerBurst).take()
}

// send sends h and a body of updates to one run of a member.
func (n *node) send(to Member, h head, body []byte) {
	if h.Kind == kAck || n.affords(to, h.Kind) {
		n.number++
		h.Number = n.number
		n.out.packets = append(n.out.packets, packet{to, append(wire.encode(nil, &h), body...)})
	}
}

// ping asks whoever is called m.Name at m.Addr for a sign of life: any run, to find who has restarted.
func (n *node) ping(m Member) {
	h := n.head(kPing)
	h.Target, h.Seq = m.Name, n.nonce()
	n.questions.add(question{m: m, h: h, until: n.now + answerFor, at: never})
	m.Born = 0
	n.send(m, h, nil)
}

// post sends m a letter.
func (n *node) post(m Member, h head, body []byte, within time.Duration) {
	h.Seq = n.nonce()
	n.questions.add(question{m: m, h: h, body: body, until: n.now + within})
	n.wakeAt(n.now)
}

// nonce is a number that nobody can guess.
func (n *node) nonce() uint32 { return n.rng.Uint32() | 1 }

// look has TCP look at m.
func (n *node) look(m Member) {
	if n.affords(m, kLook) {
		n.out.looks = append(n.out.looks, m)
	}
}

// exchange has TCP compare tables with m.
func (n *node) exchange(m Member) {
	if n.affords(m, kExchange) {
		n.logf("[DEBUG] comparing tables with %s at %s", m.Name, m.Addr)
		n.out.exchanges = append(n.out.exchanges, m)
	}
}

// inform tells m one claim, directly: a flood stays on its own side of a split.
func (n *node) inform(m Member, u update) { n.send(m, n.head(kFlood), wire.encode(nil, &u)) }

// declare believes m and tells everybody.
func (n *node) declare(m Member) {
	if e := n.t.apply(n.now, m, 0); e != nil {
		n.flood(e)
	}
}

// claim is what is believed of e, as it travels.
func (n *node) claim(e *entry) update {
	u := update{Member: e.Member}
	if e.Status.dead() {
		u.Age = uint64((n.now - e.since) / ms)
	}
	return u
}

// ---- requests ----

// question is a datagram that wants an answer: a ping, or a letter, which is sent again, less and less often,
// until its time is over or the run that it is for is gone. It counts for one answer: a recorded one proves nothing.
type question struct {
	m     Member // the run that is asked
	h     head
	body  []byte
	until time.Duration
	at    time.Duration // when to send it, or send it again; a ping: never
	wait  time.Duration // how long that is after the last time
}

type questions struct {
	open []*question
	rate bucket // of letters
}

func (qs *questions) add(q question) {
	if len(qs.open) < maxQuestions {
		qs.open = append(qs.open, &q)
	}
}

func (qs *questions) step(n *node) {
	qs.rate.fill(n.now, postRate, postBurst)
	qs.open = slices.DeleteFunc(qs.open, func(q *question) bool {
		due := n.now >= q.at && n.now < q.until && qs.rate.take()
		if n.now >= q.until || due && n.t.over(q.m) {
			return true
		}
		if due {
			q.wait = min(max(2*q.wait, resendAfter), time.Second)
			q.at = n.now + q.wait
			n.send(q.m, q.h, q.body)
		}
		n.wakeAt(max(q.at, n.now+ms))
		return false
	})
}

// ---- datagrams in ----

// dealings is what the protocol has had to do with one run of a member.
type dealings struct {
	datagrams window
	met       bool          // it has answered: somebody lives at its address
	promised  time.Duration // when it gets the next heartbeat, if it watches me
	due       time.Duration // when it is overdue, if I watch it
	reminded  bucket        // with what is believed of it
	tcpOnly   int           // probes in a row that only TCP answered
	compared  uint64        // both digests after the last comparison of tables
}

func (e *entry) deal() *dealings {
	if e.dealings == nil {
		e.dealings = &dealings{}
	}
	return e.dealings
}

// datagram takes one datagram, already opened; anyRun: it was not for this run alone.
func (n *node) datagram(from netip.AddrPort, b []byte, anyRun bool) error {
	var h head
	body, err := wire.decode(b, &h)
	if err != nil {
		return err
	}
	e := n.t.get(h.From)
	switch {
	case h.Raised > h.Incarnation || !n.plausible(h.Incarnation, n.t.highest):
		return errors.New("claims an incarnation far ahead of all that is known")
	case h.Kind > kReply || anyRun && h.Kind != kPing:
		return fmt.Errorf("sent an unexpected message, kind %d", h.Kind)
	case e == n.self && h.born() == n.self.Born: // my own, sent back
	case h.Kind == kPing:
		if h.Target == n.self.Name { // else it was meant for a former owner of this address
			n.answer(from, h, len(b))
		}
	case h.Kind == kAck:
		n.acked(h)
	case e == nil || e == n.self || e.Born != h.born(): // a run that is not remembered comes in by an exchange
		n.missed(e, h)
	case e.deal().datagrams.take(h.Number): // it counts: it has not come before
		n.detector.heard = n.now
		return n.message(e, from, h, len(b), body)
	}
	return nil
}

// message takes what counts: e has sent it just now.
func (n *node) message(e *entry, from netip.AddrPort, h head, size int, body []byte) error {
	if h.Seq != 0 && h.Kind != kCheck && h.Kind != kVote {
		n.answer(from, h, size)
	}
	n.contact(e, h)
	us, err := wire.decodeAll(body)
	switch {
	case err != nil:
		return err
	case h.Kind == kCheck:
		n.detector.asked(n, e, h)
	case h.Kind == kVote:
		n.detector.voted(n, e, h, us)
	case h.Kind == kQuery:
		return n.queries.hear(n, e, h, us)
	case h.Kind == kReply:
		n.queries.answered(n, e, h, us)
	case h.Kind == kFlood:
		for i := range us {
			if err := n.learn(&us[i], e.Name, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// answer acknowledges a datagram of size bytes. It is never larger, since the source may be forged.
func (n *node) answer(to netip.AddrPort, h head, size int) {
	a := n.head(kAck)
	a.Seq, a.Number = h.Seq, n.number+1
	if len(wire.encode(nil, &a)) > size {
		a.Digest = 0
	}
	if len(wire.encode(nil, &a)) <= size {
		n.send(Member{Name: h.From, Addr: to, Born: h.born()}, a, nil)
	}
}

// acked takes the answer to a question of mine.
func (n *node) acked(h head) {
	qs := &n.questions
	i := slices.IndexFunc(qs.open, func(q *question) bool { return q.h.Seq == h.Seq && q.m.Name == h.From })
	if i < 0 {
		return
	}
	q := qs.open[i]
	qs.open = slices.Delete(qs.open, i, i+1)
	if q.m.Addr != n.self.Addr {
		n.detector.heard = n.now
	}
	e := n.t.get(q.m.Name)
	switch {
	case e == n.self && h.born() == q.m.Born: // a namesake
		n.detector.answered(n, q.m)
	case e == nil || e.Born != q.m.Born:
	case h.born() != q.m.Born:
		if e.Status == statusFailed { // it has restarted, and may know nobody to join
			n.exchange(e.Member)
		}
	default:
		e.deal().datagrams.lower(h.Number) // only a forger's is far above what was sent just now
		if q.h.Kind == kQuery {
			n.queries.answered(n, e, head{Query: q.h.Query, Reply: replyHeard}, nil)
		}
		n.met(e)
		n.detector.answered(n, q.m)
		n.contact(e, h)
	}
}

// met notes that e answered something just now: whatever was believed, neither is cut off from the other.
func (n *node) met(e *entry) {
	if d := e.deal(); !d.met {
		d.met = true
		n.ring.linkAt = min(n.ring.linkAt, n.now+linkAfter) // if it watches me
	}
	if n.detector.alone {
		n.detector.alone = false
		n.logf("[INFO] %s answers again", e.Name)
	}
	if e.lost {
		n.t.setLost(e, false)
		n.exchange(e.Member)
	}
}

// contact looks whether e, who has said something, needs to be told: that it is thought dead, or our tables differ.
func (n *node) contact(e *entry, h head) {
	if e.Status != statusAlive || h.Incarnation != e.Incarnation {
		if e.deal().reminded.fill(n.now, 1/remindEvery.Seconds(), 1).take() {
			n.inform(e.Member, n.claim(e)) // it refutes, or tells the news of itself that I have missed
		}
		return
	}
	e.deal().tcpOnly = 0
	if h.Promise > 0 {
		e.deal().due = n.now + min(time.Duration(h.Promise)*ms, time.Minute) + overdueAfter
		n.detector.answered(n, e.Member)
	}
	if e.lost {
		n.ping(e.Member) // I hear it; does it hear me?
	} else if h.Digest != 0 && h.Digest != n.digest() {
		n.repair.want(n, e, h.Digest)
	}
}

// ---- broadcasts ----

// spread is what is to be flooded, and the user events that are remembered.
type spread struct {
	queue   [][]byte // updates on their way to my watchers
	flushAt time.Duration
	rate    bucket
	events  memory
}

// flood has everybody told of e. Before this node has come in, all that it knows is what a table just told it.
func (n *node) flood(e *entry) {
	if u := n.claim(e); n.joining.since != 0 {
		n.spread.add(&u)
	}
}

func (s *spread) add(u *update) {
	s.queue = append(s.queue[max(0, len(s.queue)-maxQueue+1):], wire.encode(nil, u)) // what overflows is left to repair
}

// flush sends the queue to all watchers: at once when the line was idle, else in batches, floodRate a second.
func (s *spread) flush(n *node) {
	if s.rate.fill(n.now, floodRate, floodRate/5); len(s.queue) > 0 && n.now >= s.flushAt {
		for len(s.queue) > 0 && s.rate.tokens >= 0 {
			var one []byte // as much as fits into a datagram
			for len(s.queue) > 0 && (len(one) == 0 || len(one)+len(s.queue[0]) <= maxDatagram-256) {
				one, s.queue = append(one, s.queue[0]...), s.queue[1:]
			}
			for _, w := range n.ring.watchers {
				if w.deal().met {
					n.send(w.Member, n.head(kFlood), one)
					s.rate.tokens--
				}
			}
		}
		s.flushAt = n.now + floodBatch + time.Duration(max(0, -s.rate.tokens)/floodRate*float64(time.Second))
	}
	if len(s.queue) > 0 {
		n.wakeAt(s.flushAt)
	}
}

// check says what is wrong with a claim from outside. Only what belongs to a claim goes on: the rest may be of any
// length.
func (n *node) check(u *update) error {
	*u = update{Member: u.Member, Age: u.Age}
	m := &u.Member
	m.Addr = netip.AddrPortFrom(m.Addr.Addr().Unmap(), m.Addr.Port())
	if !m.valid() || !n.plausible(m.Incarnation, n.t.highest) {
		return fmt.Errorf("made a bad claim about %.40q", m.Name)
	}
	return nil
}

// learn takes one update of via, which it has flooded or (x) told in a table, and passes it on if it is news.
func (n *node) learn(u *update, via string, x *exchange) error {
	if u.Name != "" {
		return n.learnEvent(u, x != nil && x.replay)
	}
	if err := n.check(u); err != nil {
		return err
	}
	m, e := u.Member, n.t.get(u.Member.Name)
	switch {
	case e == n.self:
		n.own.claimed(n, m, via)
	case x != nil && e != nil && n.doubts(x, m, e):
		n.inform(e.Member, *u) // so that it can refute that, or settle it, at once
		if p := n.detector.judge(n, e.Member); p != nil && m.Born == e.Born {
			p.count(via, vUnreachable)
		}
	default:
		revived := x == nil && e != nil && e.Status == statusFailed && m.Name == via
		n.adopt(u)
		if revived && e.Status == statusAlive && n.t.failed > 0 {
			n.exchange(e.Member) // a split has ended: it knows of many more
		}
	}
	return nil
}

// doubts reports whether m, which another table claims, is not to be believed of e: e is told, and looked at.
func (n *node) doubts(x *exchange, m Member, e *entry) bool {
	if m.Born == e.Born {
		// Adopting that e has failed undid heals: each side of a split would kill the other anew with its old verdicts.
		return m.Status == statusFailed && !e.Status.dead() && !e.lost && m.Incarnation >= e.Incarnation
	}
	// Two clusters meet, and a name lives in both: nobody shall be called failed for it. Once the holder is dead the
	// claim may come again. Who speaks of itself has met the holder, if it dialled me, or was compared with it.
	return e.visible() == statusAlive && m.Addr != e.Addr && m.supersedes(e.Member) && !m.sameRun(x.with)
}

// adopt believes a claim, if it wins, and passes it on.
func (n *node) adopt(u *update) {
	m, e, age := u.Member, n.t.get(u.Member.Name), time.Duration(min(u.Age, 1<<40))*ms
	if m.Status.dead() && age >= n.reapAfter && (e == nil || e.Status.dead()) {
		return // whoever forgets later than I do would bring it back again and again
	}
	if e != nil && !e.Status.dead() && m.Born != e.Born && m.Addr != e.Addr && m.supersedes(e.Member) {
		n.inform(e.Member, *u) // it may live: of two that begin at once, the wrong one may win for a moment
	}
	if is := n.t.apply(n.now, m, age); is != nil {
		is.known = cmp.Or(is.known, n.real) // user events go by the caller's clock: time asleep counts
		n.flood(is)
	}
}

// sound reports whether u can be a user event or a query.
func (n *node) sound(u *update) bool {
	return checkPayload("", u.Name, u.Payload) == nil && u.LTime != 0 && n.plausible(u.LTime, n.spread.events.lamport)
}

// learnEvent takes a user event; replay: also one from before this agent's time.
func (n *node) learnEvent(u *update, replay bool) error {
	s, name := &n.spread, u.Member.Name
	if validName(name) != nil || !n.sound(u) {
		return fmt.Errorf("sent a bad user event of %q", name)
	}
	// Only what belongs to an event goes on: the rest may be of any length.
	is := update{Member: Member{Name: name}, Name: u.Name, Payload: u.Payload, LTime: u.LTime, Coalesce: u.Coalesce}
	sent := n.real - time.Duration(min(u.Age, 1<<40))*ms
	if !s.events.add(userEvent{is, is.key(), sent}) || n.before(name, sent) && !replay && !n.replay {
		return nil
	}
	n.out.events = append(n.out.events, Event{kind: eventUser, update: is})
	s.add(&is)
	return nil
}

// before reports whether what name sent then was sent before my time: before I knew the sender, who was in
// another cluster, or I was not there yet. A restarted agent would else run the handler of "reboot" again.
func (n *node) before(name string, sent time.Duration) bool {
	if e := n.t.get(name); e != nil {
		return sent < e.known
	}
	return n.joining.since == 0 || sent < n.joining.since
}

// userEvent sends a user event to everybody, this node included.
func (n *node) userEvent(name string, payload []byte, coalesce bool) error {
	if err := checkPayload("event", name, payload); err != nil {
		return err
	}
	u := update{Member: Member{Name: n.self.Name}, Name: name, Payload: payload, LTime: n.spread.events.lamport + 1, Coalesce: coalesce}
	return n.learnEvent(&u, true)
}

// ---- anti-entropy ----

// repair compares tables with a peer whose digest differs, and forgets the dead.
type repair struct {
	peer   *entry // whom; nil: nobody
	at     time.Duration
	digest uint64 // that differed
	rate   bucket
	reapAt time.Duration
}

// want plans an exchange. The random wait lets a flood that is under way arrive first. What the last
// comparison left different stays so: two who forget the dead after different times would else compare tables
// for ever.
func (r *repair) want(n *node, e *entry, digest uint64) {
	r.rate.fill(n.now, 1/repairEvery.Seconds(), repairBurst)
	if r.peer == nil && e.deal().compared != digest^n.digest() && r.rate.take() {
		r.peer, r.digest = e, digest
		r.at = n.now + 20*ms + n.jitter(100*ms)
	}
}

// missed is told of a heartbeat that does not count, since its sender is not remembered. But it has me for a
// watcher, so that I have missed its news. Where all who would pass such news on are as new, I would hear of none
// of them for long: as nothing of theirs counts, they never meet me, and flood nothing to me. Of a hundred who joined
// within moments some then took 0.4 s, and 0.2 s with this.
func (n *node) missed(e *entry, h head) {
	if h.Kind != kHeartbeat || e == n.self || e != nil && h.Incarnation <= e.Incarnation {
		return
	}
	if o := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() && e.deal().met }); o != nil {
		n.repair.want(n, o, h.Digest)
	}
}

func (r *repair) step(n *node) {
	if r.peer != nil && n.now >= r.at {
		if !r.peer.Status.dead() && n.digest() != r.digest {
			n.exchange(r.peer.Member)
		}
		r.peer = nil
	} else if r.peer != nil {
		n.wakeAt(r.at)
	}
	if n.now >= r.reapAt { // often: until everybody has forgotten a member, digests differ
		r.reapAt = n.now + min(max(n.reapAfter/10, 100*ms), time.Second)
		n.t.reap(n.now, n.reapAfter)
	}
}

// exchange is one comparison of tables, as the node sees it: the dialler sends its own, and then the acceptor.
// A table goes in pieces, in the order of keys, so that none stalls the loop.
type exchange struct {
	with     Member // who answered or dialled, once known; its Addr is where I dialled
	namesake *probe // of who has my name there; the exchange waits for it
	replay   bool
	after    string // the next piece begins after this key
	digest   uint64 // the other side's, at first
}

// welcome answers a first frame: with my digest, and with the claim about the other's name. A newcomer whose
// name is taken must learn it before it says more.
func (n *node) welcome(h head) (w head, about []update) {
	if e := n.t.get(h.From); e != nil && !e.reaped {
		about = append(about, n.claim(e))
	}
	return n.head(kWelcome), about
}

// welcomed takes the welcome of whom I dialled, and what it says of me. errWait: ask again in a moment.
func (n *node) welcomed(x *exchange, h head, about []update) error {
	if h.From == n.self.Name && h.born() == n.self.Born {
		return errMyself
	}
	x.with.Name, x.with.Born, x.digest = h.From, h.born(), h.Digest
	n.detector.heard = n.now
	switch e := n.t.get(h.From); {
	case e == nil || e == n.self:
	case e.Born == h.born():
		n.met(e)
	case e.visible() == statusAlive && e.Addr != x.with.Addr:
		n.detector.judge(n, e.Member)
		return fmt.Errorf("%v", taken(e.Member)) // not as errTaken, which would end a newcomer: its own name is free
	}
	for i := range about {
		m := &about[i].Member
		if h.From == n.self.Name { // a namesake lives here, wherever it says
			m.Addr = x.with.Addr
		}
		switch {
		case n.check(&about[i]) != nil || m.Name != n.self.Name:
		case n.joining.since != 0 && m.Born > n.self.Born: // it gives way when it hears of me
		case x.namesake != nil && x.namesake.mine == vAlive:
			return taken(x.namesake.m)
		case n.own.claimed(n, *m, h.From):
			x.namesake = n.detector.probeOf(n.self)
			return errWait
		}
	}
	n.own.placed = true
	return nil
}

// piece is the next frame of my table, members first: an empty one, if the other side had just what I have now.
func (n *node) piece(x *exchange) (frame []byte, more bool) {
	h := n.head(kTable)
	if x.digest == n.digest() {
		x.after = "" // the news may have come between two pieces
		return wire.encode(nil, &h), false
	}
	var body []byte
	add := func(u update) {
		b := wire.encode(body, &u)
		if h.More = len(b) > maxFrame-512; !h.More {
			body, x.after = b, u.key()
		}
	}
	at, _ := n.t.find(x.after + "\x00") // the least name that is greater
	for ; at < len(n.t.ordered) && !h.More; at++ {
		if e := n.t.ordered[at]; !e.reaped && (e != n.self || n.detector.probeOf(n.self) == nil) {
			add(n.claim(e))
		}
	}
	for _, ev := range n.spread.events.recent {
		if !h.More && ev.key > x.after {
			u := ev.update
			u.Age = uint64((n.real - ev.sent) / ms)
			add(u)
		}
	}
	if h.Target = x.after; !h.More {
		x.after, h.Target = "", ""
	}
	return append(wire.encode(nil, &h), body...), h.More
}

// merge takes a piece of the other side's table; more says that others follow. One bad record costs that
// record; bad is how many there were.
func (n *node) merge(x *exchange, h head, us []update) (more bool, bad int, err error) {
	if h.Kind != kTable || h.More && h.Target <= x.after {
		return false, 0, errMalformed
	}
	n.detector.heard = n.now
	for _, u := range us {
		if n.learn(&u, x.with.Name, x) != nil {
			bad++
		}
	}
	if x.after = h.Target; !h.More {
		n.joining.begin(n)
	}
	return h.More, bad, nil
}

// exchanged ends a comparison of tables, of mine, that went well.
func (n *node) exchanged(x *exchange) {
	n.joining.begin(n)
	for _, e := range n.t.ordered {
		n.t.setLost(e, false) // the other side would have said so
	}
	if e := n.t.get(x.with.Name); e != nil && e != n.self {
		e.deal().compared = x.digest ^ n.digest()
		if e.Addr != x.with.Addr && x.with.Born == e.Born {
			n.logf("[INFO] %s was reached at %s and advertises %s", e.Name, x.with.Addr, e.Addr)
		}
	}
}

// ---- joining ----

// joining is when to try the seeds. To try is to compare tables with all their addresses at once.
type joining struct {
	since  time.Duration // when this node first came in, on the caller's clock; 0: not yet
	at     time.Duration // when to try next; never: that runs
	rounds int           // failed in a row
	warned bucket
	names  []string // members that answered at a seed's address
	errs   []string // of the last round
}

// begin notes that this node is in a cluster.
func (j *joining) begin(n *node) {
	if j.since == 0 {
		j.since = max(n.real, 1)
		n.flood(n.self)
	}
}

// step tries as long as no seed is an alive member: two halves of a cluster would else stay apart for ever.
func (j *joining) step(n *node) {
	if len(n.seeds) == 0 || slices.ContainsFunc(j.names, func(name string) bool {
		e := n.t.get(name)
		return e != nil && e != n.self && e.visible() == statusAlive
	}) {
		return
	}
	if n.now >= j.at {
		n.out.resolve, j.at = true, never
	}
	n.wakeAt(j.at)
}

// seedsTried ends a round: who answered, what went wrong ("ADDR: reason"), and why, if the own name is taken.
func (n *node) seedsTried(names, errs []string, why error) {
	j := &n.joining
	j.errs = errs
	if len(names) > 0 {
		if j.rounds > 0 {
			n.logf("[INFO] joined through %s", names[0])
		}
		j.names, j.rounds = names, 0
		j.at = n.now + time.Second // if none of them is believed alive
	} else {
		wait := min(250*ms<<min(j.rounds, 10), seedsMax)
		j.at = n.now + wait - n.jitter(wait/4)
		j.rounds++
	}
	text := strings.Join(errs[:min(len(errs), 5)], "; ")
	others := slices.ContainsFunc(errs, func(e string) bool { return !strings.HasSuffix(e, errMyself.Error()) })
	warn := others && j.warned.fill(n.now, 1/warnEvery.Seconds(), 1).take()
	switch {
	case j.since == 0 && why != nil:
		n.out.fatal = why
	case j.since == 0 && n.retryMax > 0 && j.rounds >= n.retryMax:
		n.out.fatal = fmt.Errorf("no seed answered in %d rounds (%s)", j.rounds, text)
	case warn && len(names) > 0:
		n.logf("[WARN] not all seeds answer (%s)", text)
	case warn:
		n.logf("[WARN] no seed answers (%s): trying on, at most every %v", text, seedsMax)
	case !others && j.rounds == 1: // one list of seeds for all is usual, and somebody is the first on it
		n.logf("[INFO] no seed answers but this node itself (%s)", text)
	}
}

// ---- identity ----

// ownName is what concerns this node's own record.
type ownName struct {
	placed  bool          // a seed has answered: it is known which address leads there
	gone    Member        // a namesake, or a former self, that was found gone
	leaving time.Duration // until when the leave may take; 0: it does not leave
}

func taken(by Member) error {
	return fmt.Errorf("the name %q %w: the member at %s has it", by.Name, errTaken, by.Addr)
}

// claimed handles a claim about this node. Where it may be that of another living agent (rival), that one is looked
// at. Any other is false, or a clock went back, and it is refuted with a higher incarnation: to everybody, and to
// whoever said so, since a flood stays on its own side of a split.
func (o *ownName) claimed(n *node, m Member, via string) (rival bool) {
	old := m.Incarnation < n.self.Incarnation // who says so has missed my refutation
	// Whoever was found gone and has raised its incarnation since then was only stopped or cut off: two would claim
	// the name for ever.
	gone := m.Born == o.gone.Born && m.Incarnation <= o.gone.Incarnation
	switch {
	case o.leaving != 0 || m == n.self.Member:
		return false
	case m.Born != n.self.Born && !m.Status.dead() && m.Addr != n.self.Addr && !gone:
		n.detector.judge(n, m)
		return true
	case !old:
		o.raise(n, m.Incarnation+1)
	}
	e := n.t.get(via)
	if e != nil && e != n.self && (old || !e.deal().met || !slices.Contains(n.ring.watchers, e)) { // else the flood tells it
		n.inform(e.Member, n.claim(n.self))
	}
	return false
}

// raise takes a higher incarnation and tells everybody.
func (o *ownName) raise(n *node, incarnation uint64) {
	m := n.self.Member
	m.Incarnation = incarnation
	n.logf("[DEBUG] refuting what is said of this node, incarnation %d", incarnation)
	n.declare(m)
}

// found settles what becomes of the name once the probe of namesake m is over. A newcomer never disturbs the
// holder, and after a split the younger gives way.
func (o *ownName) found(n *node, m Member, alive bool) {
	switch {
	case !alive:
		if o.gone = m; m.Incarnation >= n.self.Incarnation {
			o.raise(n, m.Incarnation+1)
		}
	case n.joining.since == 0: // only the join that met it fails
	case n.self.Born > m.Born:
		n.out.fatal = taken(m)
	default:
		o.raise(n, max(m.Incarnation, n.self.Incarnation)+1)
		n.exchange(m) // it does not count what a stranger sends
	}
}

// moved is told from which address this node has dialled: what it advertises is no longer (gone) an address
// of this machine, or was not the way to the first seed that answers. To the others it is a restart.
func (n *node) moved(ip netip.Addr, gone, joins bool, unixMs uint64) {
	m := n.self.Member
	first := joins && !n.own.placed && n.joining.since == 0
	if n.own.leaving != 0 || !first && !gone || ip == m.Addr.Addr() {
		return
	}
	n.own.gone = m
	m.Addr = netip.AddrPortFrom(ip, m.Addr.Port())
	m.Born = max(birth(unixMs, n.rng.Uint64()), m.Incarnation+1)
	m.Incarnation = m.Born
	n.logf("[INFO] this node has the address %s now and advertises it", ip)
	events := n.t.events
	n.declare(m)
	n.t.events = events // it has neither failed nor joined for itself
}

// setTags sets the tags in set, then drops those that drop names.
func (n *node) setTags(set map[string]string, drop []string) error {
	kv := n.self.Tags.asMap()
	maps.Copy(kv, set)
	maps.DeleteFunc(kv, func(k, _ string) bool { return slices.Contains(drop, k) })
	tags, err := makeTags(kv)
	if err != nil || tags == n.self.Tags {
		return err
	}
	m := n.self.Member
	m.Tags = tags
	m.Incarnation++
	n.declare(m)
	return nil
}

// startLeave tells the watchers that this node leaves; it has left when all of them know, or after leaveFor.
func (n *node) startLeave() {
	n.own.leaving, n.questions.open = cmp.Or(n.own.leaving, n.now+leaveFor), nil
	for _, w := range n.ring.watchers {
		n.post(w.Member, n.head(kFlood), wire.encode(nil, &update{Member: n.self.with(statusLeft)}), leaveFor)
	}
}

// forceLeave makes everybody believe that a failed member has left; with prune it also vanishes.
func (n *node) forceLeave(name string, prune bool) error {
	e := n.t.get(name)
	switch {
	case e == nil || e.visible() == 0:
		return fmt.Errorf("no member is called %q", name)
	case e.visible() == statusAlive:
		return fmt.Errorf("member %q is alive: only a failed one can be made to leave", name)
	case !e.Status.dead():
		return fmt.Errorf("this node is cut off and cannot judge %q", name)
	}
	status := statusLeft
	if prune {
		status = statusPruned
	}
	n.declare(e.with(status))
	return nil
}

// members copies what users see of those whose names follow after, sorted by name: limit of them at most.
func (n *node) members(after string, limit int) (ms []Member) {
	at, _ := n.t.find(after + "\x00") // the least name that is greater
	for ; at < len(n.t.ordered) && len(ms) < limit; at++ {
		e := n.t.ordered[at]
		s := e.visible()
		if e == n.self && n.own.leaving != 0 {
			s = statusLeaving
		}
		if s != 0 {
			ms = append(ms, e.with(s))
		}
	}
	return ms
}

// info is what this node knows of itself: key, value; and so on.
func (n *node) info() []any {
	count := make(map[Status]int)
	ms := n.members("", maxMembers)
	for _, m := range ms {
		count[m.Status]++
	}
	return []any{"cut_off", n.detector.alone, "event_time", n.spread.events.lamport, "failed", count[statusFailed], "left", count[statusLeft],
		"members", len(ms), "seeds", strings.Join(n.seeds, ","), "seeds_error", strings.Join(n.joining.errs, "; ")}
}

// ---- heartbeats ----

// ring is whom I watch, and who watches me.
type ring struct {
	seen     uint64   // version of the table that this follows
	watchers []*entry // in the order of the rings
	watched  []*entry
	nextBeat time.Duration
	linkAt   time.Duration // when to ask for other watch links; never: they are as they shall be
}

// refresh recomputes whom I watch and who watches me after a change.
func (r *ring) refresh(n *node) {
	if r.seen == n.t.version {
		return
	}
	// After a mass failure the rings must heal at once, so whom I newly watch is due soon. After a join
	// nothing is broken, and everybody is busy.
	grace := newGrace
	if n.t.shrunk > r.seen {
		grace = overdueAfter
	}
	watchers, watched := r.watchers, r.watched
	r.seen, r.watchers, r.watched = n.t.version, n.t.watchers(n.self), n.t.watched(n.self)
	for _, e := range r.watched {
		if d := e.deal(); d.due == 0 || !slices.Contains(watched, e) {
			d.due = n.now + grace
		}
	}
	for _, w := range r.watchers {
		if w.deal().promised == 0 || !slices.Contains(watchers, w) {
			r.beat(n, w)
		}
	}
	r.linkAt = min(r.linkAt, n.now+linkAfter)
}

// beat sends w a heartbeat. It promises the first beat that nobody else has been promised: were all new watchers
// told to wait for a whole cycle, nobody would notice before its end that a host vanished right after it had joined.
// From whoever has not answered yet it wants an answer: before that it gets no floods, which it would not take, if
// it has not heard of this node.
func (r *ring) beat(n *node, w *entry) {
	next := max(r.nextBeat, n.now)
	taken := func(o *entry) bool { return o != w && (o.deal().promised-next).Abs() < beatEvery/2 }
	for slices.ContainsFunc(r.watchers, taken) {
		next += beatEvery
	}
	h := n.head(kHeartbeat)
	h.Promise = uint32((next - n.now) / ms)
	if w.deal().promised = next; w.deal().met {
		n.send(w.Member, h, nil)
	} else {
		n.post(w.Member, h, nil, next-n.now)
	}
}

// step sends the next heartbeat, to the watcher whose promise ends first, and starts a probe of everybody who
// is overdue.
func (r *ring) step(n *node) {
	if len(r.watchers) > 0 {
		if n.now >= r.nextBeat {
			r.nextBeat = max(r.nextBeat+beatEvery, n.now+beatEvery/2)
			w := slices.MinFunc(r.watchers, func(a, b *entry) int { return cmp.Compare(a.deal().promised, b.deal().promised) })
			r.beat(n, w)
		}
		n.wakeAt(r.nextBeat)
	}
	for _, e := range r.watched {
		if due := e.deal().due; n.now < due {
			n.wakeAt(due)
		} else {
			n.detector.judge(n, e.Member)
		}
	}
	if n.now >= r.linkAt { // watch links to the first watchers that have answered
		n.out.links, r.linkAt = []Member{}, never
		for _, w := range r.watchers {
			if len(n.out.links) < linkCount && w.deal().met {
				n.out.links = append(n.out.links, w.Member)
			}
		}
	}
	n.wakeAt(r.linkAt)
}

// ---- probes ----

// detector is all probes that run, and whether this node hears anybody.
type detector struct {
	probes    []*probe
	heard     time.Duration // last sign of anybody
	callAt    time.Duration // the next last call
	alone     bool
	retry     bucket
	strangers bucket // what those get who have never answered
}

// probe is one look at a member: for a verdict of mine, of which a target has one at a time, or for somebody who
// asked.
type probe struct {
	m       Member        // whom, as it was believed
	e       *entry        // of that name; my own: a namesake of mine, whom no entry describes
	asker   *entry        // who wants a vote of mine; nil: nobody
	start   time.Duration // of the round
	last    bool          // the target is suspect, and this round decides
	seq     uint32        // of the checks: mine, or what the asker wrote
	stage   int           // of the round: what comes next
	mine    verdict
	stalled time.Duration // since when it accepts without answering; 0: it does not
	ended   bool          // a watch link ended: TCP did work, so two refusals mean that nobody is there
	votes   map[string]verdict
	asked   []*entry // who has not voted yet
}

// of is all probes of one run of a member.
func (d *detector) of(m Member) (ps []*probe) {
	for _, p := range d.probes {
		if p.m.sameRun(m) {
			ps = append(ps, p)
		}
	}
	return ps
}

// probeOf is the probe of e for a verdict of mine, or nil.
func (d *detector) probeOf(e *entry) *probe {
	for _, p := range d.probes {
		if p.e == e && p.asker == nil {
			return p
		}
	}
	return nil
}

func (d *detector) begin(n *node, m Member) *probe {
	n.logf("[TRACE] probing %s at %s", m.Name, m.Addr)
	p := &probe{m: m, e: n.t.get(m.Name), start: n.now, seq: n.nonce(), votes: make(map[string]verdict)}
	d.probes = append(d.probes, p)
	return p
}

// judge probes m for a verdict of mine. Where there are too many probes it has to wait: nil.
func (d *detector) judge(n *node, m Member) *probe {
	p := d.probeOf(n.t.get(m.Name))
	if p == nil && len(d.probes) < maxProbes {
		p = d.begin(n, m)
	}
	return p
}

// linkEnded is told that a watch link with a run of m has ended (tries 0), or for the how manieth time in a
// row that none could be had. It is evidence that starts a probe, never a verdict.
func (n *node) linkEnded(m Member, tries int, refused bool) {
	e := n.t.get(m.Name)
	if n.t.over(m) || e == n.self || e.lost || n.own.leaving != 0 {
		return
	}
	if tries == 4 {
		n.logf("[WARN] no TCP connection to %s at %s lasts: is TCP blocked between it and %s?", m.Name, m.Addr, n.self.Addr)
	}
	if p := n.detector.judge(n, e.Member); p != nil {
		p.ended = p.ended || tries == 0
		if refused {
			p.observed(vRefused)
		}
	}
}

func (d *detector) step(n *node) {
	for _, p := range slices.Clone(d.probes) {
		d.stepProbe(n, p)
	}
	d.stepAlone(n)
	d.stepRetry(n)
}

// stepProbe does what is due in a probe.
func (d *detector) stepProbe(n *node, p *probe) {
	switch {
	case p.solo(n) && (p.mine == vAlive || p.mine == vRefused):
		d.conclude(n, p)
		return
	case p.e != n.self && (p.e.Born != p.m.Born || p.e.Status.dead()), // that run is over
		p.last && (p.e.Status != statusSuspect || p.e.Incarnation != p.m.Incarnation): // it has refuted
		d.end(p)
		return
	case p.ended && p.mine <= vRefused && p.seen(vRefused) >= 2 && p.seen(vAlive) == 0: // nobody contradicts
		d.fail(n, p)
		return
	}
	due := [...]time.Duration{0, askAfter, askOnce, probeFor}
	if p.mine == vRefused {
		due[1] = 0
	}
	if p.asker != nil {
		due[3] = helpFor
	}
	for ; n.now >= p.start+due[p.stage]; p.stage++ {
		switch p.stage {
		case 0:
			p.asked = n.helpers(p)
			n.look(p.m)
			n.ping(p.m)
		case 1:
			n.ping(p.m)
			d.check(n, p)
		case 2:
			d.check(n, p)
		default:
			d.conclude(n, p)
			return
		}
	}
	n.wakeAt(p.start + due[p.stage])
}

// solo reports whether what I see is the verdict: a helper asks nobody, and of a namesake nobody else can tell.
func (p *probe) solo(n *node) bool { return p.asker != nil || p.e == n.self }

// helpers are the target's other watchers and one random member.
func (n *node) helpers(p *probe) []*entry {
	if p.solo(n) {
		return nil
	}
	hs := slices.DeleteFunc(n.t.watchers(p.e), func(w *entry) bool { return w == n.self })
	if r := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.skipped() && e != p.e && !slices.Contains(hs, e) }); r != nil {
		hs = append(hs, r)
	}
	return hs
}

// check asks the helpers that have not voted in this round.
func (d *detector) check(n *node, p *probe) {
	h := n.head(kCheck)
	h.Seq, h.Target = p.seq, p.m.Name
	for _, w := range p.asked {
		n.send(w.Member, h, nil)
	}
}

// anyOther picks one of the others in list for which ok holds, or nil; the list holds this node, too. Who
// follows a row that does not count is picked more often: on a ring, the one that had to watch that row.
func (n *node) anyOther(list []*entry, ok func(*entry) bool) *entry {
	at := n.rng.IntN(len(list))
	for i := range list {
		if e := list[(at+i)%len(list)]; e != n.self && ok(e) {
			return e
		}
	}
	return nil
}

// asked answers the check of by, at once where the answer is known and within helpFor else. Only members are
// looked at, at the address that I know.
func (d *detector) asked(n *node, by *entry, h head) {
	e := n.t.get(h.Target)
	again := func(p *probe) bool { return p.asker == by && p.seq == h.Seq }
	switch {
	case e == nil || e == n.self || by.Status.dead() || slices.ContainsFunc(d.probes, again):
	case e.Status.dead(): // the asker has missed it, and may have nobody else to ask
		d.vote(n, &probe{m: e.Member, asker: by, seq: h.Seq})
	case len(d.probes) < maxProbes/2: // I have my own to look at
		running := d.of(e.Member)
		p := d.begin(n, e.Member)
		p.asker, p.seq = by, h.Seq
		if len(running) > 0 && running[0].stage > 0 { // one look will do for all
			p.stage = 3
			p.observed(running[0].mine)
		}
	}
}

// vote tells the asker what was seen, and of which run: a helper that knows a newer one would else acquit the old
// one for ever.
func (d *detector) vote(n *node, p *probe) {
	h := n.head(kVote)
	h.Seq, h.Target, h.Verdict = p.seq, p.m.Name, max(p.mine, vUnreachable)
	n.send(p.asker.Member, h, wire.encode(nil, &update{Member: p.m}))
}

// voted takes a helper's answer, if it is one to a probe that still runs. One about another run is news of that.
func (d *detector) voted(n *node, by *entry, h head, us []update) {
	p := d.probeOf(n.t.get(h.Target))
	switch {
	case p == nil || p.seq != h.Seq || len(us) != 1 || us[0].Member.Name != h.Target || by == p.e || by.Status.dead():
	case us[0].Member.Born == p.m.Born:
		p.count(by.Name, min(h.Verdict, vAlive))
	case !us[0].Member.Status.dead():
		n.learn(&us[0], by.Name, nil)
	}
}

// count counts what somebody else saw.
func (p *probe) count(by string, v verdict) {
	p.votes[by] = v
	p.asked = slices.DeleteFunc(p.asked, func(w *entry) bool { return w.Name == by })
}

// seen counts the observers that saw v, me included.
func (p *probe) seen(v verdict) (c int) {
	for _, o := range append(slices.Collect(maps.Values(p.votes)), p.mine) {
		if o == v {
			c++
		}
	}
	return c
}

// ---- what is seen, and verdicts ----

// saw takes what a look by TCP has seen: first perhaps that the kernel accepts (vSilent), then vRefused, that it hung
// up (vNone), or vAlive and w, the welcome of who is there.
func (n *node) saw(m Member, v verdict, w head) {
	if m.Addr != n.self.Addr {
		n.detector.heard = n.now
	}
	if v == vAlive && (w.From != m.Name || w.born() != m.Born) {
		v = vRefused // another process lives at its address
	}
	if e := n.t.get(m.Name); v == vAlive && e != nil && e != n.self && e.Born == m.Born {
		n.met(e)
	}
	for _, p := range n.detector.of(m) {
		p.observed(v)
	}
}

// answered is told that m was heard of by UDP just now.
func (d *detector) answered(n *node, m Member) {
	for _, p := range d.of(m) {
		if p.solo(n) {
			p.observed(vAlive)
		} else {
			d.acquit(n, p)
		}
	}
}

// observed notes what I saw myself. What accepts in silence did not stall when it hangs up then, or has gone.
func (p *probe) observed(v verdict) {
	if v > p.mine || p.mine == vSilent {
		p.mine = v
	}
}

// conclude gives the verdict at the end of a round.
func (d *detector) conclude(n *node, p *probe) {
	switch {
	case p.asker != nil:
		d.end(p)
		d.vote(n, p)
	case p.e == n.self:
		d.end(p)
		n.own.found(n, p.m, p.mine == vAlive)
	case p.mine == vAlive: // by TCP alone, or a heartbeat would have acquitted it
		deal := p.e.deal()
		if deal.tcpOnly++; deal.tcpOnly == 2 { // once may be mere loss
			n.logf("[WARN] %s at %s answers TCP but not UDP: is UDP blocked between it and %s?", p.m.Name, p.m.Addr, n.self.Addr)
		}
		n.exchange(p.e.Member) // no flood reaches it
		d.acquit(n, p)
	case p.seen(vAlive) > 0:
		d.acquit(n, p)
	case p.seen(vSilent) > 0:
		d.stalled(n, p)
	case p.mine == vRefused, p.seen(vRefused) >= 2:
		d.fail(n, p)
	case p.last && n.t.alive() > 2 && n.now-d.heard > probeFor:
		d.round(n, p, n.now+askAfter) // I hear nobody at all: it may be me
	case p.last:
		d.fail(n, p)
	case len(p.votes) > 0, n.t.alive() <= 2: // nobody else reaches it either
		d.suspect(n, p)
	default: // nobody else could say
		d.round(n, p, n.now)
	}
}

// round looks anew. Votes survive: helpers that answer late would otherwise stay late, round after round.
func (d *detector) round(n *node, p *probe, start time.Duration) {
	n.wakeAt(start)
	p.start, p.stage, p.mine, p.ended = start, 0, vNone, false
}

// acquit ends a probe of a member that somebody reached.
func (d *detector) acquit(n *node, p *probe) {
	d.end(p)
	// What it promised before holds, or a whole cycle may pass: this sign of life promises nothing.
	if deal := p.e.deal(); deal.due <= n.now {
		deal.due = n.now + time.Duration(min(rings, n.t.alive()-1)+1)*beatEvery + overdueAfter
	}
}

// stalled handles a member whose kernel accepts while the process is silent. Every busy machine stalls for
// seconds; only ten count as death.
func (d *detector) stalled(n *node, p *probe) {
	if p.stalled == 0 {
		n.logf("[DEBUG] %s at %s is stalled: it accepts connections and does not answer", p.m.Name, p.m.Addr)
		p.stalled = p.start
	}
	end := p.stalled + stallFor
	if n.now >= end {
		d.fail(n, p)
		return
	}
	// Each round dials anew: a host that vanishes right after it accepted would else count as stalled.
	clear(p.votes)
	d.round(n, p, max(n.now, min(n.now+stallRound, end)-probeFor))
}

func (d *detector) end(p *probe) {
	d.probes = slices.DeleteFunc(d.probes, func(o *probe) bool { return o == p })
}

// suspect floods that the target is unreachable, and gives it time to contradict.
func (d *detector) suspect(n *node, p *probe) {
	n.logf("[DEBUG] %s at %s is suspect: nothing at all comes back", p.m.Name, p.m.Addr)
	p.m, p.last = p.e.Member, true
	n.declare(p.m.with(statusSuspect))
	n.inform(p.m, n.claim(p.e))
	d.round(n, p, n.now+suspectFor-probeFor)
}

// fail is the verdict: the target has failed, and everybody shall know.
func (d *detector) fail(n *node, p *probe) {
	d.end(p)
	n.declare(p.e.with(statusFailed))
}

// ---- isolation ----

// stepAlone decides whether I am the one who is cut off. What is then believed of the others stays with me.
func (d *detector) stepAlone(n *node) {
	silent := n.now - d.heard
	if silent < aloneAfter {
		n.wakeAt(d.heard + aloneAfter)
		return
	}
	switch e := n.anyOther(n.t.ring[0], func(e *entry) bool { return !e.lost }); {
	case e == nil:
	case silent >= aloneAfter+lastCallFor:
		d.alone = true
		n.logf("[WARN] no member answers: this node seems to be cut off, it goes on trying")
		for _, e := range n.t.ordered {
			n.t.setLost(e, e.lost || e != n.self && !e.Status.dead())
		}
	case n.now >= d.callAt:
		d.callAt = n.now + lastCallGap
		n.ping(e.Member)
		n.look(e.Member)
		fallthrough
	default:
		n.wakeAt(d.callAt)
	}
}

// stepRetry pings the failed members, so that a split heals by itself.
func (d *detector) stepRetry(n *node) {
	rate := retryRate * float64(n.t.failed) / float64(n.t.total)
	if d.retry.fill(n.now, rate, 2).take() {
		if e := n.anyOther(n.t.ordered, func(e *entry) bool { return e.visible() == statusFailed }); e != nil {
			n.ping(e.Member)
		}
	}
	if rate > 0 {
		n.wakeAt(n.now + max(time.Duration((1-d.retry.tokens)/rate*float64(time.Second)), ms))
	}
}

// ---- queries ----

// queries are those of this node that wait for answers, and those of others whose time is not over. A query
// is a letter to each member that is asked, and so is each answer, to the asker alone: nobody hears a query
// twice or late.
type queries struct {
	mine      []*query
	heard     []*query // of others, remembered until their time is over: they may arrive again
	strangers bucket   // what those get who have never answered
}

// query is one that this node has asked, or has heard.
type query struct {
	id      uint32
	until   time.Duration
	waiting []Member // whose answer has not come; of one that was heard: who asked
}

// query asks the living members that nodes names; none: all of them. It returns the query's number, which the
// eventAnswers will bear, and who was asked. The last eventAnswer has replyNone.
func (n *node) query(name string, payload []byte, nodes []string, within time.Duration) (id uint32, who []string, err error) {
	qs := &n.queries
	if err := checkPayload("query", name, payload); err != nil {
		return 0, nil, err
	}
	if len(qs.mine) >= maxQueries || len(n.questions.open) >= maxQuestions/2 {
		return 0, nil, fmt.Errorf("too many queries of this agent are under way: %d", len(qs.mine))
	}
	q := &query{id: n.nonce(), until: n.now + within}
	u := update{Member: Member{Name: n.self.Name}, Name: name, Payload: payload, LTime: n.spread.events.lamport + 1, Within: uint32(within / ms)}
	h, body := n.head(kQuery), wire.encode(nil, &u)
	h.Query = q.id
	for _, e := range n.t.ordered {
		if e.visible() != statusAlive || len(nodes) > 0 && !slices.Contains(nodes, e.Name) {
			continue
		}
		q.waiting, who = append(q.waiting, e.Member), append(who, e.Name)
		if e != n.self {
			n.post(e.Member, h, body, within)
		}
	}
	if len(who) == 0 {
		return 0, nil, errNobody
	}
	qs.mine = append(qs.mine, q)
	if slices.ContainsFunc(q.waiting, n.self.sameRun) {
		qs.answered(n, n.self, head{Query: q.id, Reply: replyHeard}, nil)
		err = qs.hear(n, n.self, h, []update{u})
	}
	return q.id, who, err
}

// hear takes a query of e.
func (qs *queries) hear(n *node, e *entry, h head, us []update) error {
	if len(us) != 1 || !n.sound(&us[0]) {
		return errors.New("sent a bad query")
	}
	u, again := us[0], func(q *query) bool { return q.id == h.Query && slices.ContainsFunc(q.waiting, e.sameRun) }
	if slices.ContainsFunc(qs.heard, again) || len(qs.heard) >= maxHeard {
		return nil
	}
	n.spread.events.lamport = max(n.spread.events.lamport, u.LTime)
	ev := Event{kind: eventQuery, update: u, id: h.Query}
	ev.Member, ev.Coalesce = e.Member, false // whatever it says: a query takes nobody's place in a queue
	within := min(time.Duration(ev.Within)*ms, heardFor)
	qs.heard = append(qs.heard, &query{ev.id, n.now + within, []Member{e.Member}})
	n.out.events = append(n.out.events, ev)
	return nil
}

// replied is told what came of ev, an eventQuery.
func (n *node) replied(ev Event, r reply, text []byte) {
	h, u := n.head(kReply), update{Payload: text}
	h.Query, h.Reply = ev.id, r
	switch e := n.t.get(ev.Member.Name); {
	case e == nil || e.Born != ev.Member.Born:
	case e == n.self:
		n.queries.answered(n, e, h, []update{u})
	default:
		n.post(e.Member, h, wire.encode(nil, &u), min(time.Duration(ev.Within)*ms, replyFor))
	}
}

// answered takes what e says of a query of mine.
func (qs *queries) answered(n *node, e *entry, h head, us []update) {
	waits := func(q *query) bool { return q.id == h.Query && slices.ContainsFunc(q.waiting, e.sameRun) }
	i := slices.IndexFunc(qs.mine, waits)
	if i < 0 || h.Reply == replyNone || h.Reply > replyFailed {
		return
	}
	q, ev := qs.mine[i], Event{kind: eventAnswer, update: update{Member: e.Member}, id: h.Query, reply: h.Reply}
	if h.Reply != replyHeard {
		q.waiting = slices.DeleteFunc(q.waiting, e.sameRun)
	}
	for _, u := range us {
		ev.Payload = u.Payload[:min(len(u.Payload), maxPayload)]
	}
	n.out.events = append(n.out.events, ev)
}

// step ends queries: when everybody who lives has answered, or their time is over.
func (qs *queries) step(n *node) {
	qs.heard = slices.DeleteFunc(qs.heard, func(q *query) bool { return n.now >= q.until })
	qs.mine = slices.DeleteFunc(qs.mine, func(q *query) bool {
		if q.waiting = slices.DeleteFunc(q.waiting, n.t.over); len(q.waiting) == 0 || n.now >= q.until {
			n.out.events = append(n.out.events, Event{kind: eventAnswer, id: q.id})
			return true
		}
		n.wakeAt(q.until)
		return false
	})
}

// ---------------------------------------------------------------------------
// The loop: one goroutine owns the node and never blocks. UDP is here, too.

// gossipConfig is what newGossip needs to know. The member's address is what others are told: none means the
// bound one, its port 0 the bound port.
type gossipConfig struct {
	nodeConfig
	door
	bind  netip.AddrPort // UDP and TCP; port 0 takes a free one
	moves bool           // the address was not chosen by the user: it may change
	log   *log.Logger
	// events is called from the loop with each event, and with what takes a query's answer: it must not block.
	events func(ev Event, answer func(r reply, text []byte))
}

// gossip runs a node: it owns its sockets and the loop. Its methods are safe for concurrent use.
type gossip struct {
	cfg    gossipConfig
	guests // at the TCP port, with the seal of both, and all else that is under way
	udp    *net.UDPConn
	start  time.Time
	self   atomic.Pointer[claim] // the own record, and whether this node is cut off, at the last tick
	alone  atomic.Bool
	inputs chan func(*node) // what the loop shall do
	tables chan struct{}    // a place for each exchange that others have dialled
	ended  chan struct{}    // the loop; done: also all that it has started
	done   chan struct{}    // all has ended: err and last may be read
	owned
}

// owned is what the loop alone touches until it has ended.
type owned struct {
	node     *node
	links    map[string]context.CancelFunc
	feeds    map[*feed]bool
	lines    bucket  // of the log about members
	unlogged int     // lines that were left out
	err      error   // why it ended; nil: it was told to
	last     []Event // what handlers shall still hear then
}

// newGossip binds the sockets. The loop, run, is still to be started: it begins to join the seeds.
func newGossip(cfg gossipConfig) (*gossip, error) {
	g := &gossip{cfg: cfg, start: time.Now(), inputs: make(chan func(*node), maxInputs), tables: make(chan struct{}, maxTables),
		ended: make(chan struct{}), done: make(chan struct{}),
		guests: guests{limit: guestLimit(), log: cfg.log}}
	g.door, g.cfg.kind = &g.cfg.door, gossipPort
	if err := g.listen(); err != nil {
		return nil, err
	}
	self, bound := &cfg.member, g.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	self.Addr = netip.AddrPortFrom(cmp.Or(self.Addr.Addr(), bound.Addr().Unmap()), cmp.Or(self.Addr.Port(), bound.Port()))
	crand.Read(cfg.random[:])
	self.Born = birth(uint64(g.start.UnixMilli()), rand.Uint64())
	self.Incarnation = self.Born
	g.owned = owned{node: newNode(cfg.nodeConfig, 0), links: make(map[string]context.CancelFunc), feeds: make(map[*feed]bool)}
	g.self.Store(g.node.self.claim)
	g.ctx, g.quit = context.WithCancel(context.Background())
	g.wg.Go(g.readUDP)
	g.wg.Go(func() { g.accept(g.serve) })
	return g, nil
}

// listen binds UDP and TCP to one port. Somebody may take a free one between the two, so 0 is tried again.
func (g *gossip) listen() (err error) {
	for range 10 {
		lc := net.ListenConfig{KeepAlive: -1}
		if g.tcp, err = lc.Listen(context.Background(), "tcp"+family(g.cfg.bind.Addr()), g.cfg.bind.String()); err != nil {
			return err
		}
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(g.cfg.bind.Addr(), uint16(g.tcp.Addr().(*net.TCPAddr).Port)))
		if g.udp, err = net.ListenUDP("udp"+family(g.cfg.bind.Addr()), at); err == nil {
			return g.udp.SetReadBuffer(1 << 20)
		}
		g.tcp.Close()
		if g.cfg.bind.Port() != 0 {
			return err
		}
	}
	return err
}

// run is the loop: the only goroutine that touches the node.
func (g *gossip) run() {
	for planned := time.Duration(0); g.ctx.Err() == nil; {
		select {
		case input := <-g.inputs:
			g.node.enter(time.Since(g.start), input)
		case <-time.After(max(planned-time.Since(g.start), 0)):
		case <-g.ctx.Done():
		}
		// What has arrived meanwhile comes first. Whoever was stopped must hear it before it judges, so the readers
		// get a moment to hand it over. Peers that never stop sending must not keep the node from ticking.
		if time.Since(g.start)-planned > lateBy {
			time.Sleep(2 * ms)
		}
		for end := time.Since(g.start) + drainFor; time.Since(g.start) < end && len(g.inputs) > 0; {
			g.node.enter(time.Since(g.start), <-g.inputs)
		}
		out := g.node.tick(time.Since(g.start))
		g.carryOut(out)
		planned = out.wake
	}
	close(g.ended)
	g.udp.Close()
	g.guests.close()
	close(g.done)
}

// carryOut does what the node wants done.
func (g *gossip) carryOut(out outputs) {
	g.self.Store(g.node.self.claim)
	g.alone.Store(g.node.detector.alone)
	for _, l := range out.logs {
		g.cfg.log.Print(l)
	}
	for _, ev := range out.events {
		g.publish(ev)
	}
	if len(out.packets) > 0 {
		// At a deadline of 1 ms, a process that had to wait for its processor lost whole batches.
		g.udp.SetWriteDeadline(time.Now().Add(writeFor))
		for _, p := range out.packets {
			g.udp.WriteToUDPAddrPort(g.door.closeDatagram(p.data, p.to.Name, p.to.Born), p.to.Addr)
		}
		g.udp.SetWriteDeadline(time.Time{}) // or its timer would wake the process
	}
	for _, m := range out.looks {
		g.wg.Go(func() { g.look(m) })
	}
	for _, m := range out.exchanges { // one that fails is wanted again
		g.wg.Go(func() { g.compare(m.Addr, &exchange{}, false) })
	}
	if out.links != nil {
		g.relink(g.node.self.Member, out.links)
	}
	if out.resolve {
		g.wg.Go(func() {
			names, errs, why := g.join(g.cfg.seeds, false)
			g.call(func(n *node) { n.seedsTried(names, errs, why) })
		})
	}
	if out.fatal != nil || out.left {
		if g.err = out.fatal; out.left {
			g.last = []Event{{kind: eventLeave, update: update{Member: g.node.self.with(statusLeft)}}} // for those that deregister it
		}
		g.quit()
	}
}

// publish hands an event to the log, to the handlers, and to those who watch.
func (g *gossip) publish(ev Event) {
	for f := range g.feeds {
		f.put(ev)
	}
	m, what := ev.Member, fmt.Sprintf("%s (from %s, %d bytes)", oneLine(ev.Name), ev.Member.Name, len(ev.Payload))
	switch {
	case ev.kind == eventAnswer:
		return
	case ev.kind == eventUser:
		g.cfg.log.Printf("[INFO] user-event: %s", what)
	case ev.kind == eventQuery:
		g.cfg.log.Printf("[DEBUG] query: %s", what)
	case !g.lines.fill(time.Since(g.start), linesRate, linesBurst).take():
		g.unlogged++
	default:
		if g.unlogged > 0 {
			g.cfg.log.Printf("[WARN] %d lines about members were left out", g.unlogged)
		}
		g.unlogged = 0
		g.cfg.log.Printf("[INFO] %s: %s %s", ev.kind, m.Name, m.Addr)
	}
	g.cfg.events(ev, func(r reply, text []byte) { g.call(func(n *node) { n.replied(ev, r, text) }) })
}

func (g *gossip) readUDP() {
	for buf := make([]byte, maxDatagram+1); ; {
		size, from, err := g.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue // an ICMP answer to something sent before
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		self := g.self.Load()
		data, anyRun, err := g.door.openDatagram(buf[:size], self.Name, self.Born)
		if err != nil {
			if !errors.Is(err, errNotForMe) {
				g.unwelcome(from.Addr(), err)
			}
			continue
		}
		data = slices.Clone(data)
		select {
		case g.inputs <- func(n *node) { g.unwelcome(from.Addr(), n.datagram(from, data, anyRun)) }:
		default:
			g.dropped.Add(1)
		}
	}
}

// call has the loop run f, unless it has ended.
func (g *gossip) call(f func(*node)) {
	select {
	case g.inputs <- f:
	case <-g.ended:
	}
}

// do runs f in the loop and waits for it.
func (g *gossip) do(f func(*node) error) error {
	ran := make(chan error, 1)
	g.call(func(n *node) { ran <- f(n) })
	select {
	case err := <-ran:
		return err
	case <-g.ended:
		return errStopped
	}
}

// me returns this node's own record, whose Addr is the advertised one, and whether it is cut off.
func (g *gossip) me() (m Member, alone bool) { return g.self.Load().Member, g.alone.Load() }

// leave tells everybody that this node leaves, waits at most a second for that, and stops the loop.
func (g *gossip) leave() error {
	err := g.do(func(n *node) error { n.startLeave(); return nil })
	<-g.done
	return err
}

// close stops the loop at once, without leaving.
func (g *gossip) close() {
	g.quit()
	<-g.done
}
