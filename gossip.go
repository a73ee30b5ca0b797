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
//	seal            encryption, and the receiver of a datagram
//	replay window   each datagram counts once
//	awake time      the clock that all deadlines run on, and rates
//	node            inputs and outputs
//	the verbs       what its parts ask of the node
//	requests        what waits for an answer
//	datagrams in    what comes, and what it tells
//	broadcasts      how news spreads
//	user events     their order, and how fast they may come
//	anti-entropy    comparing tables with a peer
//	joining         the seeds
//	identity        this node's own name, address and tags
//	heartbeats      the watchers and the watched
//	probes          how a lateness becomes evidence
//	verdicts        and how evidence becomes a verdict
//	isolation       is it this node? and pings to the failed
//	queries         what users ask members, and the answers
//	commands        what users ask this node
//	the loop        the one goroutine that owns all this, with UDP

package main

import (
	"bytes"
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

// The protocol's times and bounds. They were settled in simulation: the stories in the tests are the
// measurements.
const (
	broadcastBatch     = 2 * ms
	broadcastRate      = 200              // packets a second
	eventRate          = 4000             // the same of user events: senders are slowed down when it is not enough
	eventsCalm         = 200 * ms         // after which events that differ were missed, and are not under way
	eventBurst         = 64               // packets in one go: the watchers' sockets must hold those of four
	eventRepairEvery   = 40 * ms          // broadcasts that overtake each other need less
	eventRepairTries   = 5                // by UDP, before tables are compared
	eventAwayTries     = 12               // while the sender is not there to ask
	eventRepairPackets = 8                // in answer to one request
	eventRepairRate    = 20               // of requests that are answered to one peer, a second
	eventGapTimeout    = 5 * time.Second  // then an event that did not come is given up
	eventAwayTimeout   = time.Minute      // the same while its sender is not there to ask: a split may end
	eventMemory        = 10 * time.Minute // for how long more than the last few events are remembered
	eventCheckTimeout  = 2 * time.Second  // for so long an agent waits for a member that does not keep up

	syncInterval   = time.Second
	syncBurst      = 4 // at once, or of a hundred who join at once some would wait a second for what they missed
	claimInterval  = 200 * ms
	resendAfter    = 50 * ms         // the first time, or two round trips; each wait is twice as long
	requestTimeout = 3 * time.Second // for so long the answer to a ping counts
	leaveTimeout   = time.Second
	lateBy         = 100 * ms // how much later than planned a wake-up may count

	// A late seed must not be waited for longer than it is late.
	seedsOften    = time.Second
	seedsOftenFor = time.Minute
	seedsMax      = 30 * time.Second
	warnEvery     = 10 * time.Minute // at first; each wait is twice as long
	maxWarnWait   = 24 * time.Hour

	// What waits for an answer waits for at least two round trips. Up to shortLine the protocol's times are longer
	// than that, and a line is measured once; a longer one at times, since it may have been a stall.
	shortLine      = 50 * ms
	longestLine    = 2500 * ms
	remeasureAfter = 2 * time.Minute

	maxDatagram      = 1400
	maxFrame         = 32 << 10
	maxQueue         = 4096 // claims and events that wait to be broadcast
	maxRecent        = 64
	maxReceivers     = 20
	recentFor        = 3 * time.Second
	maxRequests      = 2 * maxMembers
	maxQueries       = 64          // of one's own at a time
	replyTimeout     = time.Minute // a reply is sent again for so long at most
	maxQueryTimeout  = time.Hour
	reliableRate     = 64000   // reliable sends a second
	reliableBurst    = 64      // and in one go: a thousand at once would be lost
	replayedPingRate = 1000    // answers a second to pings that may be recordings
	maxInputs        = 1024    // that wait for the loop; more datagrams are lost
	drainFor         = 20 * ms // inputs may keep the loop from its tick
	writeFor         = 20 * ms // what the socket does not take by then is lost, as UDP may be

	// What one peer can occupy is a share, never the whole. An honest peer comes nowhere near: it has maxQueries
	// queries under way, and a few probes.
	maxHeardOfPeer    = 4 * maxQueries // queries that are remembered, its last ones
	maxRequestsToPeer = 8 * maxQueries
	maxProbesForPeer  = maxProbes / 8

	// Bystanders whose addresses are forged get, all together, so many queries a second, and at once. Only
	// this agent's own users make it send queries; of all else the bystanders get a hundredth of that.
	amplificationRate  = 2000
	amplificationBurst = 6000
	queryCost          = 1
	unaskedCost        = 100
)

var (
	errMalformed   = errors.New("sent a malformed message")
	errSelf        = errors.New("that is this node itself")
	errNameTaken   = errors.New("is taken")
	errNameHeld    = errors.New("is not free yet")
	errNobodyAsked = errors.New("nobody is asked: no living member matches the query")
	errStopped     = errors.New("the agent is stopping")
	errEventsWait  = errors.New("earlier events of this agent have not reached all members yet")
)

// The detector's times and bounds; a probe counts from its start. They are those of a short line: see schedule.
const (
	heartbeatInterval = 500 * ms                        // one heartbeat, to one watcher at a time
	earlyInterval     = 125 * ms                        // while there are new watchers
	overdueAfter      = 100 * ms                        // past its promise
	maxPromise        = (rings + 1) * heartbeatInterval // the longest cycle; a first heartbeat may come after it
	newWatchGrace     = 500 * ms
	linksWanted       = 2 // watchers that hold a watch link
	relinkDelay       = 100 * ms
	linkOverlap       = time.Second // for so long a former link stands beside the new ones
	linkTries         = 4           // in a row that failed: no further one is evidence

	indirectAfter      = 100 * ms // a second ping, and helpers
	indirectAgainAfter = 300 * ms // more: those whose result has not come
	helperTimeout      = 350 * ms // a helper's result
	probeTimeout       = 600 * ms // the end of a round
	suspicionTimeout   = 1500 * ms
	stallTimeout       = 10 * time.Second
	stallRound         = time.Second
	isolatedAfter      = 3 * time.Second
	isolatedMargin     = 900 * ms // or two round trips: what was asked for by then may be answered
	retryRate          = 2.0      // pings a second, times the failed share of the table
	maxProbes          = 256
	unansweredFor      = 5 * time.Second // a watcher does not answer, though it is heard
	tolerableLoss      = 8               // heartbeats in a row

	nameRetry       = 100 * ms                     // while a newcomer waits for its name
	nameHeldTimeout = stallTimeout + 2*time.Second // by then the cluster has noticed that the holder is gone
	nameTie         = time.Second                  // that two agents of one name came in one after the other
)

// ---- messages ----

// msgKind says what a message is. The heartbeat is 0, which gob leaves out.
type msgKind uint8

const (
	msgHeartbeat      msgKind = iota
	msgPing                   // wants a sign of life of Target
	msgAck                    // answers a request; Seq is the request's
	msgIndirectProbe          // asks a helper to probe Target
	msgProbeResult            // a helper's result
	msgBroadcast              // carries claims and user events
	msgQuery                  // carries a query
	msgReply                  // to a msgQuery
	msgEventCheck             // wants an answer once the sender's user events up to this one have come
	msgEventRequest           // wants what comes after this user event of its sender
	msgTCPProbe               // first frame of a session: who answers there?
	msgLink                   // first frame: an idle link whose end tells that the member has died
	msgSync                   // first frame: a state sync
	msgHandshakeReply         // answers a first frame
	msgTable                  // a chunk of the table
	msgBye                    // this link ends, and its member has not died
	// Later versions have more kinds, and this one takes no notice of them.
)

// reply says what a member does about a query.
type reply uint8

const (
	replyNone    reply = iota // none will come any more
	replyAck                  // it has the query
	replyNothing              // it has no handler for it
	replyDone                 // the output of its handler
	replyFailed               // the same, and it failed: the first line says how
)

// header opens every datagram and every frame between agents. gob leaves out zeros, so one struct serves all
// kinds.
type header struct {
	Kind        msgKind
	From        string
	Incarnation uint64
	Raised      uint64 // Incarnation minus the instance; 0 until the member raised it
	Number      uint64 // of this datagram among all of the sender's instance
	Digest      uint64
	// Promise is, in milliseconds, of a heartbeat: when the next one to the same receiver comes; of an indirect
	// probe: the requester's round trip to the target, if that is long.
	Promise uint32
	Seq     uint32 // of a request (any but an indirect probe wants a msgAck), and of its answer
	Query   uint32 // the asker's number of a query
	// Target is whom a ping, an indirect probe or its result is about; of a chunk of a table, where it ends, and
	// of the last one nothing; of a first frame, the dialler's address.
	Target  string
	Verdict verdict
	Reply   reply
	More    bool   // msgTable: another chunk follows; msgHandshakeReply: the node is in a cluster
	Ext     string // for what later versions will say; this one does not look at it
}

// instance is the sender's.
func (hdr *header) instance() uint64 { return hdr.Incarnation - hdr.Raised }

// verdict is what one observer saw of a target, in rising weight as evidence that a process is there.
type verdict uint8

const (
	verdictNone        verdict = iota
	verdictUnreachable         // nothing at all
	verdictRefused             // the host is there, the process is not
	verdictSilent              // the kernel accepts, the process does not answer
	verdictAlive
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
var wire = newCodec(&header{}, &update{}, &rpcRequest{}, &rpcResponse{})

func newCodec(messages ...any) *codec {
	c := &codec{ids: make(map[reflect.Type][]byte)}
	c.enc = gob.NewEncoder(&c.buf)
	c.dec = gob.NewDecoder(&c.in)
	for _, m := range messages {
		// The first message of a type brings the type's definition with it, all others do not.
		c.in.Reset(c.encode(nil, m))
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
	c.write(m)
	for i := range us {
		c.write(&us[i])
	}
	return append(dst, c.buf.Bytes()...)
}

func (c *codec) write(m any) {
	err := c.enc.Encode(m)
	if err != nil {
		panic(err) // flat structs always encode
	}
}

// decode decodes the message that opens b into m, which must be fresh, and returns what follows it.
func (c *codec) decode(b []byte, m any) (rest []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errMalformed, r)
		}
	}()

	// gob gets only what it can do no harm with: a message of the wanted type, of a length that is there. New
	// definitions, which could grow the decoder without bound, do not get in.
	size, prefix := messageSize(b)
	if prefix == 0 || size > len(b)-prefix || !bytes.HasPrefix(b[prefix:], c.ids[reflect.TypeOf(m)]) {
		return nil, errMalformed
	}

	c.in.Reset(b[:prefix+size])
	if err := c.dec.Decode(m); err != nil || c.in.Len() > 0 {
		return nil, errMalformed
	}
	return b[prefix+size:], nil
}

// messageSize reads the length of the message that opens b; prefix is how many bytes gob takes for the length
// itself. 0: there is none, or it is more than a frame holds.
func messageSize(b []byte) (size, prefix int) {
	switch {
	case len(b) > 0 && b[0] < 128:
		return int(b[0]), 1
	case len(b) > 1 && b[0] == 0xff:
		return int(b[1]), 2
	case len(b) > 2 && b[0] == 0xfe:
		return int(binary.BigEndian.Uint16(b[1:])), 3
	}
	return 0, 0
}

// decodeAll decodes updates up to the end of b.
func (c *codec) decodeAll(b []byte) (us []update, err error) {
	for len(b) > 0 {
		var u update
		b, err = c.decode(b, &u)
		if err != nil {
			return nil, err
		}
		us = append(us, u)
	}
	return us, nil
}

// ---- seal ----

// sealer seals and opens what travels between ports of one kind. With keys everything is authenticated before
// anything is decoded, together with its receiver, so that what was said to one instance cannot be replayed to
// another.
type sealer struct {
	cluster   string
	keys      [][]byte // of 16, 24 or 32 bytes: the first one seals, any opens; see noKey
	portKind  byte
	otherPort uint16 // the agent's port of the other kind
}

// noKey stands among keys for no encryption: packets in clear are taken while it is there, and sent while it is
// first. So a running cluster gets its first key in three rounds, as it gets another one.
var noKey = []byte{}

// sealsWithKey reports whether what is sent is encrypted.
func (d *sealer) sealsWithKey() bool { return len(d.keys) > 0 && len(d.keys[0]) > 0 }

// opensInClear reports whether what is not encrypted is taken.
func (d *sealer) opensInClear() bool {
	return len(d.keys) == 0 || slices.ContainsFunc(d.keys, func(key []byte) bool { return len(key) == 0 })
}

// fingerprint tells keys apart without showing them.
func fingerprint(key []byte) string {
	if len(key) == 0 {
		return "none"
	}
	sum := sha256.Sum256(append([]byte("fingerprint "), key...))
	return fmt.Sprintf("%x", sum[:4])
}

// receiverHash tells the receiver, in clear, by a hash.
func (d *sealer) receiverHash(receiver string) []byte {
	h := fnv.New32a()
	io.WriteString(h, d.cluster+"\x00"+receiver)
	return h.Sum(nil)
}

// blockFor is AES under a key that is derived from key for the receiver alone (HKDF-Expand, RFC 5869), in this
// cluster.
func (d *sealer) blockFor(key []byte, receiver string) cipher.Block {
	derived, _ := hkdf.Expand(sha256.New, key, d.cluster+"\x00"+receiver, len(key))
	block, _ := aes.NewCipher(derived)
	return block
}

// aead is AES-GCM under the receiver's key. For another receiver it does not open.
func (d *sealer) aead(key []byte, receiver string) cipher.AEAD {
	// Nonces are random and have 96 bits, which is enough for 2^32 messages under one key (NIST SP 800-38D, 8.3):
	// one instance, or the pings to one name, get fewer.
	a, _ := cipher.NewGCMWithRandomNonce(d.blockFor(key, receiver))
	return a
}

// seal appends data, sealed for the receiver, to dst.
func (d *sealer) seal(dst, data []byte, receiver string) []byte {
	dst = append(dst, d.receiverHash(receiver)...)
	if !d.sealsWithKey() {
		return append(dst, data...)
	}
	return d.aead(d.keys[0], receiver).Seal(dst, nil, data, nil)
}

// open returns the data that was sealed for the receiver.
func (d *sealer) open(b []byte, receiver string) ([]byte, error) {
	if len(b) < 4 || !bytes.Equal(b[:4], d.receiverHash(receiver)) {
		return nil, errNotForMe
	}

	sealed := b[4:]
	for _, key := range d.keys {
		if len(key) == 0 {
			continue
		}
		data, err := d.aead(key, receiver).Open(nil, nil, sealed, nil)
		if err == nil {
			return data, nil
		}
	}
	if d.opensInClear() {
		return sealed, nil
	}
	return nil, errOtherKey
}

// Two agents whose protocols differ by one form one cluster: each understands its own and the one before it, and
// what is sent to a member is of the highest that both understand. Those before 5 are not spoken any more.
const (
	protocolVersion = 5
	maxProtocol     = 32 // what claims a higher one is noise
	protocolOldest  = max(protocolVersion-1, 5)
)

// spokenWith is the protocol for a member that understands theirs at most; 0: that is not known.
func spokenWith(theirs uint8) uint8 {
	if theirs == 0 {
		return protocolOldest
	}
	return max(min(theirs, protocolVersion), protocolOldest)
}

// checkProtocol says what is wrong with a protocol that the other side speaks.
func checkProtocol(theirs uint8) error {
	const format = "%w %d, this agent %d: upgrade %s one, one protocol at a time"
	switch {
	case theirs < 5:
		return fmt.Errorf("%w %d or older, this agent %d: upgrade that one", errVersion, theirs, protocolVersion)
	case theirs < protocolOldest:
		return fmt.Errorf(format, errVersion, theirs, protocolVersion, "that")
	case theirs > protocolVersion+1:
		return fmt.Errorf(format, errVersion, theirs, protocolVersion, "this")
	}
	return nil
}

// datagramFor names the receiver of a datagram: an instance of name, or (0) any of them.
func datagramFor(name string, instance uint64) string {
	return "datagram " + strconv.FormatUint(instance, 36) + " " + name
}

// sealDatagram makes a datagram of data for a member: for that instance or (Instance 0) any of its name; only a
// ping is.
func (d *sealer) sealDatagram(data []byte, to Member) []byte {
	b := append(make([]byte, 0, 64+len(data)), spokenWith(to.Protocol))
	return d.seal(b, data, datagramFor(to.Name, to.Instance))
}

// openDatagram opens one for self; anyInstance: it was for any instance of the name. errNotForMe: it is of another
// cluster, for the former owner of the address, or for a former instance.
func (d *sealer) openDatagram(b []byte, self Member) (data []byte, anyInstance bool, err error) {
	if len(b) == 0 {
		return nil, false, errMalformed
	}
	if protocol := b[0]; protocol < protocolOldest || protocol > protocolVersion {
		err := checkProtocol(protocol)
		if err == nil || protocol > maxProtocol {
			err = errMalformed // a later version speaks this protocol to this agent
		}
		return nil, false, err
	}
	if len(b) > maxDatagram {
		return nil, false, errors.New("sent a datagram that is too long")
	}

	data, err = d.open(b[1:], datagramFor(self.Name, self.Instance))
	if !errors.Is(err, errNotForMe) {
		return data, false, err
	}
	data, err = d.open(b[1:], datagramFor(self.Name, 0))
	return data, true, err
}

// ---- replay window ----

// replayWindow tells which of the numbers that an instance gives its datagrams have counted: none counts twice
// (RFC 4303, section 3.4.3). What is 64 behind the highest does not count at all.
type replayWindow struct {
	top  uint64
	seen uint64 // a bit for each number, from top down
}

// accept reports whether number counts, and notes that it has.
func (w *replayWindow) accept(number uint64) bool {
	if number > w.top {
		w.seen <<= number - w.top
		w.top = number
	}
	bit := uint64(1) << (w.top - number) // 0 when it is too far behind
	if number == 0 || bit == 0 || w.seen&bit != 0 {
		return false
	}
	w.seen |= bit
	return true
}

// handleAnswer takes the number of an answer. asked is what the highest was when its request was first sent.
func (w *replayWindow) handleAnswer(number, asked uint64) {
	// A sender numbers on from what it has sent before. So a lower number shows that the highest one was
	// forged. Where that cannot be (with a key) no answer is lower, however late it comes.
	if number < asked {
		*w = replayWindow{top: number, seen: ^uint64(0)}
		return
	}
	w.accept(number)
}

// closedWindow lets nothing count until an answer comes.
func closedWindow() replayWindow { return replayWindow{top: ^uint64(0), seen: ^uint64(0)} }

// ---- awake time ----

// advance runs awake time, which all deadlines run on, to now on the caller's clock.
func (n *node) advance(now time.Duration) {
	// A process that was stopped would blame all others for its own silence. So a gap counts for no more than the
	// planned wait and a little.
	n.now += max(min(now, n.out.wake+lateBy)-n.real, 0)
	n.real = now
}

// wakeAt asks to be woken at awake time t, which may be never.
func (n *node) wakeAt(t time.Duration) {
	planned := n.out.wake - n.real
	n.out.wake = n.real + min(planned, max(t-n.now, 0))
}

// bucket bounds a rate; its tokens may fall below 0, and then it is empty.
type bucket struct {
	tokens float64
	at     time.Duration
}

// fill lets rate tokens a second run in, and burst of them lie.
func (b *bucket) fill(now time.Duration, rate, burst float64) {
	if b.at == 0 {
		b.tokens = burst
	}
	b.tokens = min(b.tokens+rate*(now-b.at).Seconds(), burst)
	b.at = now
}

// take fills the bucket and takes cost tokens, if they are there. It reports whether they were.
func (b *bucket) take(now time.Duration, cost, rate, burst float64) bool {
	b.fill(now, rate, burst)
	if b.tokens < cost {
		return false
	}
	b.tokens -= cost
	return true
}

// takeEvery takes one token, of which one comes in each interval.
func (b *bucket) takeEvery(interval time.Duration, burst float64, now time.Duration) bool {
	return b.take(now, 1, 1/interval.Seconds(), burst)
}

// debt is how long it takes until the tokens are not below 0.
func (b *bucket) debt(rate float64) time.Duration {
	return time.Duration(max(0, -b.tokens) / rate * float64(time.Second))
}

// ---- node ----

type packet struct {
	to   Member // that instance, or (Instance 0) any of that name
	data []byte
}

// outputs is all that a node wants done, in order.
type outputs struct {
	packets   []packet
	tcpProbes []Member // probe these by TCP
	links     []Member // all watch links that are wanted; nil: no change
	syncs     []Member // compare tables with these
	events    []Event
	logs      []logLine
	seeds     []int         // try these, each on its own
	wake      time.Duration // when to tick next, on the caller's clock; see advance
	left      bool          // the leave is done
	fatal     error         // the node must not go on
}

// nodeConfig is what a node starts with.
type nodeConfig struct {
	member    Member // its Incarnation is its Instance: see newInstanceID
	seeds     []string
	retryMax  int           // failed tries of each seed; 0: for ever
	reapAfter time.Duration // the dead are shown no more after this, and forgotten after twice this: see table.reap
	replay    bool          // deliver user events of before this agent's time
	random    [32]byte
}

// node is one member's view of the cluster and all its protocol state.
type node struct {
	real        time.Duration // the caller's clock, at the last entry
	now         time.Duration // awake time
	cfg         nodeConfig
	rng         *rand.Rand
	table       *table
	self        *entry
	out         outputs
	sending     sending
	requests    requests
	heartbeats  heartbeats
	detector    detector
	broadcasts  broadcasts
	antiEntropy antiEntropy
	joining     joining
	identity    identity
	queries     queries
}

// sending is what limits and numbers the datagrams of a node.
type sending struct {
	number        uint64 // of the last one
	amplification bucket // what is sent to those that have never answered
	replayedPings bucket // answers to these, and to unknown senders
}

// newNode makes a node of cfg; now is the caller's clock.
func newNode(cfg nodeConfig, now time.Duration) *node {
	n := &node{cfg: cfg, rng: rand.New(rand.NewChaCha8(cfg.random)), table: &table{}}
	n.real = now
	n.now = time.Second // so that 0 can mean never
	n.out.wake = now

	cfg.member.Status = statusAlive
	cfg.member.Protocol = protocolVersion
	n.self = n.table.apply(n.now, cfg.member, 0)
	n.self.noteFirstHeard(now) // what a former instance of this name has sent is over

	n.detector.heardFrom(n.now)
	n.detector.retry = bucket{n.rng.Float64(), n.now} // or all members ping at the same moments
	n.joining.seeds = make([]seed, len(cfg.seeds))
	n.joining.memberAt = n.now
	return n
}

// step is the one way in: it runs the clock to now, then input, which may call whatever is told to a node.
func (n *node) step(now time.Duration, input func(*node)) {
	n.advance(now)
	input(n)
}

// tick does all that has fallen due and returns what the node wants done. The caller must have handed in all
// that had arrived before (a queued heartbeat clears its sender).
func (n *node) tick(now time.Duration) outputs {
	n.advance(now)
	n.out.wake = now + time.Second // an isolated node has no heartbeats to wake it, and dead members to forget

	n.requests.step(n)
	if n.identity.leaving == 0 {
		n.stepMember()
	} else {
		n.stepLeave()
	}
	n.broadcasts.step(n)

	o := n.out
	n.out = outputs{wake: o.wake}
	o.events = append(o.events, n.table.takeEvents()...)
	return o
}

// stepMember does what is due in the parts of a node that is not leaving.
func (n *node) stepMember() {
	n.heartbeats.refresh(n)
	n.heartbeats.step(n)
	n.detector.step(n)
	n.antiEntropy.step(n)
	n.joining.step(n)
	n.queries.step(n)

	if n.heartbeats.version != n.table.version {
		n.heartbeats.refresh(n)
		n.wakeAt(n.now) // retries follow the new ring in the next tick
	}
}

// stepLeave ends the leave when all that were told have acknowledged it, or its time is over.
func (n *node) stepLeave() {
	acknowledged := len(n.requests.open) == 0
	if acknowledged || n.now >= n.identity.leaving {
		n.out.left = true
	}
	n.wakeAt(n.identity.leaving)
}

// jitter is a random part of d, so that members do not act in step.
func (n *node) jitter(d time.Duration) time.Duration { return time.Duration(n.rng.Int64N(int64(d))) }

func (n *node) logf(level logLevel, format string, a ...any) {
	n.out.logs = append(n.out.logs, logLine{level, fmt.Sprintf(format, a...)})
}

// rareWarning is when a warning was given last, and for how long it is not given again.
type rareWarning struct {
	last time.Duration
	wait time.Duration
}

// warnRarely warns of what goes on: at once, and again after warnEvery, and then ever more rarely.
func (n *node) warnRarely(w *rareWarning, format string, a ...any) {
	since := n.now - w.last
	if since < w.wait {
		return
	}

	longOver := since >= 3*w.wait
	w.wait = min(2*w.wait, maxWarnWait)
	if longOver {
		w.wait = warnEvery // it begins anew
	}
	w.last = n.now
	n.logf(levelWarn, format, a...)
}

// logLevel says how much a log line matters.
type logLevel int32

const (
	levelTrace logLevel = iota
	levelDebug
	levelInfo
	levelWarn
	levelErr
)

// levelNames are the words that users see; the index is the logLevel.
var levelNames = []string{"TRACE", "DEBUG", "INFO", "WARN", "ERR"}

// logLine is a line for the log, without its date.
type logLine struct {
	level logLevel
	text  string
}

func (l logLine) String() string { return "[" + levelNames[l.level] + "] " + l.text }

// logger takes the lines of the log. It never blocks.
type logger func(logLine)

func (l logger) printf(level logLevel, format string, a ...any) {
	l(logLine{level, fmt.Sprintf(format, a...)})
}

// ---- the verbs ----

// header is the header of a message of kind k from this node.
func (n *node) header(k msgKind) header {
	hdr := header{Kind: k, From: n.self.Name, Incarnation: n.self.Incarnation}
	hdr.Raised = n.self.Incarnation - n.self.Instance

	switch k {
	case msgHeartbeat, msgPing, msgAck: // a ping's makes room for the answer's, which is never larger than its ping
		hdr.Digest = n.calmDigest()
	case msgTCPProbe:
		hdr.Target = n.self.Addr.String()
	case msgSync:
		hdr.Digest = n.digest()
		hdr.Target = n.self.Addr.String() // another holder of the name can then say where this node lives
	case msgHandshakeReply:
		hdr.Digest = n.digest()
		hdr.More = n.inCluster()
	}
	return hdr
}

// inCluster reports whether this node has come into a cluster, or is the one that others come to.
func (n *node) inCluster() bool { return n.joining.joinedAt != 0 || len(n.cfg.seeds) == 0 }

// digest covers the table, and how many user events of each member are known.
func (n *node) digest() uint64 { return n.table.digest ^ n.table.eventsDigest }

// calmDigest leaves the events out while they come in: as long as some are under way, no two members have the
// same.
func (n *node) calmDigest() uint64 {
	if n.now-n.broadcasts.heardAt < eventsCalm {
		return n.table.digest
	}
	return n.digest()
}

// agreesWith reports whether there is nothing to tell a member that has this digest.
func (n *node) agreesWith(digest uint64) bool {
	if digest == n.digest() || digest == n.calmDigest() {
		return true
	}
	forgets := n.now - n.cfg.reapAfter
	return n.table.agreesAround(digest, forgets-2*n.reapInterval(), forgets+2*n.reapInterval())
}

func (n *node) reapInterval() time.Duration { return min(max(n.cfg.reapAfter/10, 100*ms), time.Second) }

// amplify takes what it costs to send m something that it has not asked for, a message of kind k. It reports whether
// that is allowed. It costs nothing to send it to a member that has answered at that address.
func (n *node) amplify(m Member, k msgKind) (allowed bool) {
	e := n.table.get(m.Name)
	if e != nil && e.Addr == m.Addr && e.isValidated() {
		return true
	}
	cost := float64(unaskedCost)
	if k == msgQuery || k == msgEventCheck || k == msgEventRequest {
		cost = queryCost
	}
	return n.sending.amplification.take(n.now, cost, amplificationRate, amplificationBurst)
}

// send sends a header and a body of updates to one instance of a member.
func (n *node) send(to Member, hdr header, body []byte) {
	// An answer is never larger than its request, and so amplifies nothing.
	if hdr.Kind != msgAck {
		allowed := n.amplify(to, hdr.Kind)
		if !allowed {
			return
		}
	}

	e := n.table.get(to.Name)
	if to.Protocol == 0 && e != nil {
		to.Protocol = e.Protocol
	}

	n.sending.number++
	hdr.Number = n.sending.number
	data := append(wire.encode(nil, &hdr), body...)
	n.out.packets = append(n.out.packets, packet{to, data})
}

// ping asks the member for a sign of life: any instance of m.Name at m.Addr, to find one that has restarted.
func (n *node) ping(m Member) {
	hdr := n.header(msgPing)
	hdr.Target = m.Name
	hdr.Seq = n.nonce()
	n.addRequest(request{m: m, h: hdr, until: n.now + requestTimeout, at: never, sent: n.now})

	m.Instance = 0
	n.send(m, hdr, nil)
}

// sendReliable sends m a datagram until it is acknowledged.
func (n *node) sendReliable(m Member, hdr header, body []byte, within time.Duration) {
	hdr.Seq = n.nonce()
	n.addRequest(request{m: m, h: hdr, body: body, until: n.now + within})
	n.wakeAt(n.now)
}

// addRequest opens a request.
func (n *node) addRequest(q request) {
	peer := &peerState{}
	e := n.table.get(q.m.Name)
	if e != nil && e.Instance == q.m.Instance {
		peer = e.peer()
	}
	q.asked = peer.datagrams.top
	n.requests.add(q, peer)
}

// nonce is a number that cannot be guessed.
func (n *node) nonce() uint32 { return n.rng.Uint32() | 1 }

// tcpProbe has m probed by TCP.
func (n *node) tcpProbe(m Member) {
	allowed := n.amplify(m, msgTCPProbe)
	if allowed {
		n.out.tcpProbes = append(n.out.tcpProbes, m)
	}
}

// sync has tables compared with m, by TCP.
func (n *node) sync(m Member) {
	allowed := n.amplify(m, msgSync)
	if !allowed {
		return
	}
	n.logf(levelDebug, "comparing tables with %s at %s", m.Name, m.Addr)
	n.out.syncs = append(n.out.syncs, m)
}

// sendClaim tells m one claim, directly: a broadcast stays on its own side of a split.
func (n *node) sendClaim(m Member, u update) { n.send(m, n.header(msgBroadcast), wire.encode(nil, &u)) }

// applyAndBroadcast believes m and tells all members.
func (n *node) applyAndBroadcast(m Member) {
	if e := n.table.apply(n.now, m, 0); e != nil {
		n.broadcast(e)
	}
}

// claim is what is believed of e, as it travels.
func (n *node) claim(e *entry) update {
	return update{Member: e.Member, Age: uint64(max(n.now-e.since, 0) / ms)}
}

// age is how long ago, by u, the member came in or died.
func (u *update) age() time.Duration { return time.Duration(min(u.Age, 1<<40)) * ms }

// ---- requests ----

// request is a datagram that wants an answer: a ping, or a reliable send. It counts for one answer: a recorded one
// proves nothing.
type request struct {
	m     Member // the instance that is asked
	h     header
	asked uint64 // the highest number of its datagrams, before
	body  []byte
	peer  *peerState // of m, which counts them
	until time.Duration
	at    time.Duration // when to send it, or send it again; a ping: never
	wait  time.Duration // how long that is after the last time
	sent  time.Duration // when it was, if once only: otherwise an answer measures nothing (Karn's algorithm)
}

type requests struct {
	open []*request
	rate bucket // of reliable sends
}

// add opens a request to a peer.
func (qs *requests) add(q request, peer *peerState) {
	if len(qs.open) >= maxRequests || peer.requests >= maxRequestsToPeer {
		return
	}
	peer.requests++
	q.peer = peer
	qs.open = append(qs.open, &q)
}

func (qs *requests) removeAll() {
	for _, q := range qs.open {
		q.peer.requests--
	}
	qs.open = nil
}

// takeAnswered removes the request of name that carries seq, and returns it; nil: there is none.
func (qs *requests) takeAnswered(name string, seq uint32) *request {
	i := slices.IndexFunc(qs.open, func(q *request) bool { return q.h.Seq == seq && q.m.Name == name })
	if i < 0 {
		return nil
	}
	q := qs.open[i]
	qs.open = slices.Delete(qs.open, i, i+1)
	q.peer.requests--
	return q
}

// step sends what is due, and drops the requests whose time is over or whose receiver is gone.
func (qs *requests) step(n *node) {
	qs.rate.fill(n.now, reliableRate, reliableBurst)
	open := qs.open[:0]
	for _, q := range qs.open {
		isDue := n.now >= q.at && qs.rate.tokens >= 1
		if n.now >= q.until || isDue && n.table.ended(q.m) {
			q.peer.requests--
			continue
		}

		if isDue {
			qs.rate.tokens--
			q.send(n)
		}
		n.wakeAt(max(q.at, n.now+ms))
		open = append(open, q)
	}
	clear(qs.open[len(open):])
	qs.open = open
}

// send sends a request once more, or for the first time, and plans the next time: less and less often.
func (q *request) send(n *node) {
	first := q.wait == 0
	q.sent = 0
	if first {
		q.sent = n.now
	}
	q.wait = max(min(2*q.wait, time.Second), resendAfter, 2*n.roundTripTo(q.m))
	q.at = n.now + q.wait
	n.send(q.m, q.h, q.body)
}

// ---- datagrams in ----

// peerState is what the protocol knows of one instance of a member.
type peerState struct {
	datagrams     replayWindow
	requests      int           // open ones to it
	lagging       bool          // it does not keep up with this node's user events, which does not wait for it
	validated     bool          // it has answered: a process lives at its address
	greeted       bool          // it watches this node and has been sent a heartbeat
	due           time.Duration // when it is overdue, if this node watches it
	claimRate     bucket        // with what is believed of it
	eventRate     bucket        // with user events that it has missed
	pingRate      bucket        // with pings that others bring about
	tcpOnly       int           // probes in a row that only TCP answered
	syncedDigests uint64        // both digests after the last state sync
	newsRate      bucket        // with news that it may have missed
	line          line
	seenQueries   []uint32 // its last queries: they may arrive again

	path peerPath
	flap flapState
}

// peerPath is what is known about the way to and from a member, beside whether its address is validated.
type peerPath struct {
	source          netip.AddrPort // where its last datagram that counted came from
	reachedAt       netip.AddrPort // where tables were compared, if it does not advertise that
	occupant        string         // who has answered at its address instead of it
	unansweredSince time.Duration  // since when it is a watcher that does not answer, though it is heard
	missingBeats    int            // probes in a row that it answered although its heartbeat had not come
}

// flapState is how a member came back; see damp.
type flapState struct {
	cameBack    time.Duration // when it was last shown alive again after it had failed; 0: never
	count       int           // how often in a row it failed soon after that, or did not answer while damped
	dampedUntil time.Duration // when it is probed again; 0: not yet planned
}

// peer is the state of e, for what writes it: it is made when it is not there.
func (e *entry) peer() *peerState {
	if e.state == nil {
		e.state = &peerState{}
	}
	return e.state
}

// isValidated reports whether e has answered at its address.
func (e *entry) isValidated() bool { return e.state != nil && e.state.validated }

// isHeard reports whether a datagram of e has counted.
func (e *entry) isHeard() bool { return e.state != nil && e.state.path.source.IsValid() }

// isUnreached reports whether what is broadcast may not reach e.
func (e *entry) isUnreached() bool { return e.isSkipped() || !e.isValidated() }

// roundTrip is how long an answer of e takes; 0: that is not known.
func (e *entry) roundTrip() time.Duration {
	if e.state == nil {
		return 0
	}
	return e.state.line.roundTrip
}

// line is how long the way to a peer is.
type line struct {
	roundTrip time.Duration // the last one that was measured; 0: none was
	measureAt time.Duration // when to measure it again, if it is long
}

// isSettled reports whether the line needs no measurement.
func (l *line) isSettled(now time.Duration) bool {
	isShort := l.roundTrip > 0 && l.roundTrip <= shortLine
	return isShort || now < l.measureAt
}

// note takes a measured round trip, which holds for so long.
func (l *line) note(now, took, holds time.Duration) {
	was := l.roundTrip
	l.roundTrip = min(max(took, 1), longestLine)
	l.measureAt = now + holds
	// One that is much longer than the last may have been a stall, and is measured once more.
	if l.roundTrip > 3*was+shortLine {
		l.measureAt = now
	}
}

// noteSessionRoundTrip notes how long a hello and its answer took, if nothing better is known: TCP may have sent one
// of them again.
func (n *node) noteSessionRoundTrip(name string, instance uint64, took time.Duration) {
	e := n.table.get(name)
	isPeer := e != nil && e != n.self && e.Instance == instance
	if isPeer && e.roundTrip() == 0 {
		n.noteRoundTrip(e, took)
	}
}

// noteRoundTrip notes how long an answer of e took.
func (n *node) noteRoundTrip(e *entry, took time.Duration) {
	// The jitter keeps all lines from being measured in the same moments.
	e.peer().line.note(n.now, took, remeasureAfter+n.jitter(remeasureAfter))
}

// roundTripTo is how long an answer of m takes. A line that has not been measured is taken to be as long as the
// longest to those that this node watches, or that watch it.
func (n *node) roundTripTo(m Member) time.Duration {
	e := n.table.get(m.Name)
	if e != nil && e.Instance == m.Instance && e.roundTrip() > 0 {
		return e.roundTrip()
	}
	return n.longestRoundTrip()
}

func (n *node) longestRoundTrip() (longest time.Duration) {
	for _, e := range n.heartbeats.watchers {
		longest = max(longest, e.roundTrip())
	}
	for _, e := range n.heartbeats.watched {
		longest = max(longest, e.roundTrip())
	}
	return longest
}

// overdueMargin is how much later than promised a heartbeat of m may come: a longer line varies by more.
func (n *node) overdueMargin(m Member) time.Duration { return max(overdueAfter, n.roundTripTo(m)/4) }

// handleDatagram takes one datagram, already opened; anyInstance: it was for any instance of this node's name.
func (n *node) handleDatagram(from netip.AddrPort, b []byte, anyInstance bool) error {
	var hdr header
	body, err := wire.decode(b, &hdr)
	if err != nil {
		return err
	}
	if hdr.Raised > hdr.Incarnation {
		return errMalformed
	}
	if anyInstance && hdr.Kind != msgPing {
		return fmt.Errorf("sent an unexpected message, kind %d", hdr.Kind)
	}

	e := n.table.get(hdr.From)
	if e == n.self && hdr.instance() == n.self.Instance {
		return nil // it came from this node, and was sent back
	}
	switch hdr.Kind {
	case msgPing:
		n.handlePing(e, from, hdr, len(b))
		return nil
	case msgAck:
		n.handleAck(hdr)
		return nil
	}

	// An instance that is not remembered comes in by a state sync.
	if e == nil || e == n.self || e.Instance != hdr.instance() {
		n.handleUnknownHeartbeat(e, hdr)
		return nil
	}
	peer := e.peer()
	fresh := peer.datagrams.accept(hdr.Number)
	if !fresh {
		// Without a key, the number that it is behind may be forged. So, if e waits for an answer, it is pinged: its
		// own answer shows which number it has reached.
		if hdr.Seq != 0 {
			n.pingAtBoundedRate(e)
		}
		return nil
	}
	n.detector.heardFrom(n.now)
	peer.path.source = from
	return n.handleMessage(e, from, hdr, len(b), body)
}

// handlePing answers a ping.
func (n *node) handlePing(e *entry, from netip.AddrPort, hdr header, size int) {
	if hdr.Target != n.self.Name {
		return // it was meant for a former owner of this address
	}

	fresh := false
	if e != nil && e.Instance == hdr.instance() {
		fresh = e.peer().datagrams.accept(hdr.Number)
	}
	// A recorded ping can be replayed again and again, also without a key. So those that have come before, and
	// those of a sender that is not remembered, get so many answers a second, all together.
	if !fresh {
		allowed := n.sending.replayedPings.takeEvery(time.Second/replayedPingRate, replayedPingRate, n.now)
		if !allowed {
			return
		}
	}
	n.sendAck(from, hdr, size)
}

// pingAtBoundedRate pings e about something that only e can settle.
func (n *node) pingAtBoundedRate(e *entry) {
	allowed := e.peer().pingRate.takeEvery(claimInterval, 1, n.now)
	if allowed {
		n.ping(e.Member)
	}
}

// handleMessage takes what counts: e has sent it just now.
func (n *node) handleMessage(e *entry, from netip.AddrPort, hdr header, size int, body []byte) error {
	if hdr.wantsAck() {
		n.sendAck(from, hdr, size)
	}
	n.noteContact(e, hdr)

	us, err := wire.decodeAll(body)
	if err != nil {
		return err
	}
	switch hdr.Kind {
	case msgIndirectProbe:
		n.detector.handleIndirectProbe(n, e, hdr)
	case msgProbeResult:
		n.detector.handleProbeResult(n, e, hdr, us)
	case msgQuery:
		return n.queries.handleQuery(n, e, hdr, us)
	case msgReply:
		n.queries.handleAnswer(n, e, hdr, us)
	case msgEventCheck:
		return n.handleEventCheck(e, from, hdr, size, us)
	case msgEventRequest:
		return n.handleEventRequest(e, us)
	case msgBroadcast:
		return n.handleBroadcast(e, us)
	}
	return nil
}

// wantsAck reports whether the datagram is to be acknowledged at once. An indirect probe is answered by its
// result, and an event check when the events are there.
func (hdr *header) wantsAck() bool {
	switch hdr.Kind {
	case msgIndirectProbe, msgProbeResult, msgEventCheck:
		return false
	}
	return hdr.Seq != 0
}

// handleBroadcast takes what the member has broadcast. One bad update costs that update; the first is returned as
// an error.
func (n *node) handleBroadcast(by *entry, us []update) error {
	var first error
	for i := range us {
		err := n.handleUpdate(&us[i], by.Name, nil)
		if first == nil {
			first = err
		}
	}
	return first
}

// sendAck acknowledges a datagram of size bytes. The answer is never larger, since the source may be forged.
func (n *node) sendAck(to netip.AddrPort, hdr header, size int) {
	a := n.header(msgAck)
	a.Seq = hdr.Seq
	a.Number = n.sending.number + 1
	if len(wire.encode(nil, &a)) > size {
		a.Digest = 0
	}
	if len(wire.encode(nil, &a)) <= size {
		n.send(Member{Name: hdr.From, Addr: to, Instance: hdr.instance()}, a, nil)
	}
}

// handleAck takes the answer to a request of this node.
func (n *node) handleAck(hdr header) {
	q := n.requests.takeAnswered(hdr.From, hdr.Seq)
	if q == nil {
		return
	}
	n.detector.heardFrom(n.now)

	e := n.table.get(q.m.Name)
	sameInstance := hdr.instance() == q.m.Instance
	switch {
	case e == n.self: // a name conflict: the other holder was asked
		if sameInstance {
			n.detector.handleSignOfLife(n, q.m)
		}
	case e == nil || e.Instance != q.m.Instance: // what was asked does not count any more
	case sameInstance:
		n.noteAck(q, e, hdr)
	case e.Status == statusFailed: // it has restarted, and may know no member to join
		n.sync(e.Member)
	}
}

// noteAck notes that e, the instance that was asked, has answered request q at its address.
func (n *node) noteAck(q *request, e *entry, hdr header) {
	e.peer().datagrams.handleAnswer(hdr.Number, q.asked)
	n.table.prove(Member{Name: e.Name, Incarnation: hdr.Incarnation})
	if q.sent > 0 {
		n.noteRoundTrip(e, n.now-q.sent)
	}

	switch q.h.Kind {
	case msgEventCheck:
		n.broadcasts.flow.checked(e)
	case msgQuery:
		n.queries.handleAnswer(n, e, header{Query: q.h.Query, Reply: replyAck}, nil)
	}

	n.noteValidated(e)
	n.detector.handleSignOfLife(n, q.m)
	n.noteContact(e, hdr)

	// A split has ended, and e knows of many more; or e does not take what this node sends, since it knows another
	// agent of its name.
	if e.Status == statusFailed {
		n.antiEntropy.syncNow(n, e.Member)
		n.pingAtBoundedRate(e) // what this node has just told it may be lost
	}
}

// noteHostValidated notes that e lives on the host that it advertises: it may be sent what it has not asked for.
func (n *node) noteHostValidated(e *entry) {
	if e.isValidated() {
		return
	}
	e.peer().validated = true
	n.heartbeats.planLinks(n) // if it watches this node
}

// noteValidated notes that e answered something just now at its address.
func (n *node) noteValidated(e *entry) {
	n.noteHostValidated(e)
	n.detector.noteAnswered(n, e)
	if e.local.isolated {
		n.table.setIsolated(n.now, e, false)
		n.sync(e.Member)
	}
	n.table.release(n.now, e)
}

// noteUnanswered notes that w, a watcher, is sent a heartbeat and has never answered one.
func (n *node) noteUnanswered(w *entry) {
	if !w.isHeard() {
		return
	}
	path := &w.peer().path
	if path.unansweredSince == 0 {
		path.unansweredSince = n.now
		n.tcpProbe(w.Member) // UDP may be what is blocked
	}
	if n.now-path.unansweredSince > unansweredFor {
		n.warnOfSilence(w)
	}
}

// warnOfSilence says that e, which is there by its own or others' word, does not answer here: the address that it
// advertises is not its own, or does not lead there from this host.
func (n *node) warnOfSilence(e *entry) {
	heard := "is called alive by others"
	if e.isHeard() {
		heard = "is heard from " + e.peer().path.source.String()
	}
	occupied := ""
	if e.peer().path.occupant != "" {
		occupied = fmt.Sprintf(" (%s does)", e.peer().path.occupant)
	}
	n.warnOfAddress("%s %s and does not answer at %s%s, which it advertises: "+
		"what is sent to it from here, %s, is lost", e.Name, heard, e.Addr, occupied, n.self.Addr)
}

// warnOfAddress says that an address does not work, and what to do about it: one line in ten minutes, since it
// goes on.
func (n *node) warnOfAddress(format string, a ...any) {
	const remedy = ". Each agent must advertise an address at which all others reach it: see -advertise"
	n.warnRarely(&n.identity.addressWarned, format+remedy, a...)
}

// noteContact looks whether e, which has just said something, needs to be told something: that it is believed to
// be dead, or that the tables differ.
func (n *node) noteContact(e *entry, hdr header) {
	if e.Status != statusAlive || hdr.Incarnation != e.Incarnation {
		n.sendOwnClaim(e)
		return
	}
	e.peer().tcpOnly = 0
	if hdr.Promise > 0 {
		n.heartbeats.handleHeartbeat(n, e, hdr.Promise)
	}
	if e.local.isolated {
		n.ping(e.Member) // it is heard; does it hear this node?
		return
	}
	if hdr.Digest != 0 && !n.agreesWith(hdr.Digest) {
		if e.isValidated() {
			n.broadcasts.sendRecent(n, e)
		}
		n.antiEntropy.requestSync(n, e, hdr.Digest)
	}
}

// sendOwnClaim tells e what is believed of it. It refutes that, or answers with the news of itself that this node
// has missed.
func (n *node) sendOwnClaim(e *entry) {
	allowed := e.peer().claimRate.takeEvery(claimInterval, 1, n.now)
	if allowed {
		n.sendClaim(e.Member, n.claim(e))
	}
}

// ---- broadcasts ----

// broadcasts is what is to be broadcast, and the user events that are remembered.
type broadcasts struct {
	claims  broadcastQueue
	news    broadcastQueue // user events, which are sent faster: acknowledgements bound their number
	events  eventBuffer
	heardAt time.Duration // when the last user event came in
	gaps    []*eventGap
	flow    eventFlow

	recent []recentEntry // whose claims were broadcast last, the newest last
}

// broadcastQueue holds updates on their way to the watchers.
type broadcastQueue struct {
	queue   [][]byte
	flushAt time.Duration
	rate    bucket
}

// recentEntry is a member to which something happened a moment ago.
type recentEntry struct {
	e  *entry
	at time.Duration
}

// appendBounded appends item to list, which loses its oldest one for it when there are limit of them.
func appendBounded[T any](list []T, limit int, item T) []T {
	return append(list[max(0, len(list)-limit+1):], item)
}

// broadcast has all members told of e.
func (n *node) broadcast(e *entry) {
	if n.joining.joinedAt == 0 {
		return // all that a node knows before it has come in is what a table just told it
	}
	u := n.claim(e)
	n.broadcasts.claims.add(&u)
	n.broadcasts.noteRecent(e, n.now)
}

// noteRecent notes that e's claim is being broadcast.
func (s *broadcasts) noteRecent(e *entry, now time.Duration) {
	s.recent = slices.DeleteFunc(s.recent, func(r recentEntry) bool { return r.e == e })
	s.recent = appendBounded(s.recent, maxRecent, recentEntry{e, now})
}

// sendRecent tells a member, whose table differs, the claims that it may have missed, as many as fit into a datagram.
// While many join over a long line, each is told the table as it was a moment ago, and broadcasts do not reach it
// before it has answered: to compare tables takes four round trips, and this one.
func (s *broadcasts) sendRecent(n *node, to *entry) {
	var missed broadcastQueue
	for _, r := range slices.Backward(s.recent) {
		isNew := n.now-r.at <= recentFor
		if isNew && r.e != to && !r.e.local.reaped {
			u := n.claim(r.e)
			missed.add(&u)
		}
	}
	if len(missed.queue) == 0 {
		return
	}
	allowed := to.peer().newsRate.takeEvery(claimInterval, 1, n.now)
	if allowed {
		n.send(to.Member, n.header(msgBroadcast), missed.takeBody())
	}
}

// add queues an update. What overflows is left to anti-entropy.
func (q *broadcastQueue) add(u *update) {
	q.queue = appendBounded(q.queue, maxQueue, wire.encode(nil, u))
}

func (s *broadcasts) step(n *node) {
	s.stepGaps(n)
	s.flow.step(n)
	s.claims.flush(n, broadcastRate, broadcastRate/5)
	s.news.flush(n, eventRate, eventBurst)
}

// flush sends the queue to its receivers: at once when the line was idle, else in batches, rate packets a second.
func (q *broadcastQueue) flush(n *node, rate, burst float64) {
	q.rate.fill(n.now, rate, burst)
	if len(q.queue) == 0 {
		return
	}
	if n.now < q.flushAt {
		n.wakeAt(q.flushAt)
		return
	}

	receivers := n.broadcasts.receivers(n)
	for len(q.queue) > 0 && q.rate.tokens >= 0 {
		body := q.takeBody()
		for _, e := range receivers {
			n.send(e.Member, n.header(msgBroadcast), body)
			q.rate.tokens--
		}
	}

	q.flushAt = n.now + broadcastBatch + q.rate.debt(rate)
	if len(q.queue) > 0 {
		n.wakeAt(q.flushAt)
	}
}

// takeBody takes as many updates off the queue as fit into a datagram.
func (q *broadcastQueue) takeBody() (body []byte) {
	for len(q.queue) > 0 {
		next := q.queue[0]
		if len(body) > 0 && len(body)+len(next) > maxDatagram-256 {
			break
		}
		body = append(body, next...)
		q.queue = q.queue[1:]
	}
	return body
}

// receivers are the next members on each ring that have answered: watchers from far away may not have, for a while.
// Those that have just joined through this node, and were not heard of since, know no other yet.
func (s *broadcasts) receivers(n *node) []*entry {
	es := n.table.successors(n.self, (*entry).isUnreached)
	for _, r := range slices.Backward(s.recent) {
		isNew := n.now-r.at <= recentFor && r.e.isValidated() && !r.e.isHeard()
		if isNew && !r.e.isSkipped() && !slices.Contains(es, r.e) {
			es = append(es, r.e)
		}
	}
	return es[:min(len(es), maxReceivers)]
}

// sanitizeClaim says what is wrong with a claim from outside. Only what belongs to a claim is kept: the rest may
// be of any length.
func (n *node) sanitizeClaim(u *update) error {
	*u = update{Member: u.Member, Age: u.Age}
	m := &u.Member
	m.Addr = netip.AddrPortFrom(m.Addr.Addr().Unmap(), m.Addr.Port())
	if !m.isValid() {
		return fmt.Errorf("made a bad claim about %.40q", m.Name)
	}

	e := n.table.get(m.Name)
	if e != nil && e.isMovedBy(*m) {
		return fmt.Errorf("made a claim that %.40q has moved from %s to %s, as the same instance",
			m.Name, e.Addr, m.Addr)
	}
	return nil
}

// Incarnations from outside are limited: one forged datagram with the highest number of all would make its member
// irrefutable for good. Hearsay leads no further than a little above what the member itself has said first-hand; so
// the member can go above whatever is believed of it. A limit that grew with hearsay was climbed in forged steps.
const (
	hearsayLimit    = 1 << 56       // an instance that starts in the year 2109
	formerRunLimit  = 1 << 63       // of what a restarted agent is told of its former instance at a join
	firstHandLimit  = 1<<64 - 1<<21 // nearly none
	incarnationRoom = 1 << 20       // how often a member may have refuted since it was last asked
)

// isPlausibleClaim reports whether the incarnation of m, a claim about e that came as sync says, can be believed.
func (n *node) isPlausibleClaim(m Member, e *entry, sync *stateSync) bool {
	limit := uint64(hearsayLimit)
	switch {
	case n.isFirstHand(m, e, sync):
		limit = firstHandLimit
	case e == n.self && n.joining.joinedAt == 0 && sync != nil:
		limit = formerRunLimit
	case e == n.self:
		limit = max(limit, e.Incarnation+incarnationRoom)
	case e != nil:
		limit = max(limit, e.proven+incarnationRoom)
	}
	return m.Incarnation <= limit
}

// isFirstHand reports whether m is a member's word about itself, told at its address where this node has dialled
// it; or what a seed believes when this node comes in, which then counts as known.
func (n *node) isFirstHand(m Member, e *entry, sync *stateSync) bool {
	dialled := sync != nil && sync.peer.Addr.IsValid()
	if !dialled {
		return false
	}
	ownWord := m.sameInstance(sync.peer) && m.Addr == sync.peer.Addr
	moved := e != nil && !e.Status.isDead() && e.Addr != m.Addr
	return n.joining.joinedAt == 0 || ownWord && !moved
}

// handleImplausible handles a claim that cannot be believed by hearsay. It may be true: the member may have
// refuted what only others were told of it. So the member is asked.
func (n *node) handleImplausible(m Member, e *entry) error {
	believedAlive := e != nil && !e.Status.isDead()
	switch {
	case e == n.self:
	case m.Status.isDead():
		if believedAlive {
			n.detector.startProbe(n, e.Member)
		}
	case e != nil && e.Instance == m.Instance && e.Addr == m.Addr:
		n.pingAtBoundedRate(e)
	default:
		n.antiEntropy.syncNow(n, m)
	}
	return fmt.Errorf("claims an incarnation of %.40q that is far above all that is known", m.Name)
}

// isMovedBy reports whether m says that the instance of e lives elsewhere.
func (e *entry) isMovedBy(m Member) bool {
	if m.Instance != e.Instance || sameEndpoint(m.Addr, e.Addr) {
		return false
	}
	// An agent whose address changes is a new instance, so m is false. Only where nothing has ever answered may the
	// known address have been false.
	return e.isValidated() || !e.Status.isDead()
}

// sameEndpoint compares without the zone, which means something else on each machine.
func sameEndpoint(a, b netip.AddrPort) bool {
	return a.Port() == b.Port() && a.Addr().WithZone("") == b.Addr().WithZone("")
}

// handleUpdate takes one update of via, which it has broadcast or, with sync, told in a table. News is passed on.
func (n *node) handleUpdate(u *update, via string, sync *stateSync) error {
	if u.Name != "" {
		return n.handleUserEvent(u, via, sync != nil && sync.replay)
	}
	if err := n.sanitizeClaim(u); err != nil {
		return err
	}
	m := u.Member
	e := n.table.get(m.Name)
	if !n.isPlausibleClaim(m, e, sync) {
		return n.handleImplausible(m, e)
	}

	firstHand := n.isFirstHand(m, e, sync) // before the claim is applied
	switch {
	case e == n.self:
		n.identity.handleSelfClaim(n, *u, via)
	case sync != nil && e != nil && n.needsProbe(sync, m, e):
		n.probeClaimed(e, u, via)
	default:
		n.applyAndForward(u)
	}
	if firstHand {
		n.table.prove(m)
	}
	return nil
}

// needsProbe reports whether m, which another table claims, is not to be believed of e before e has been probed.
func (n *node) needsProbe(sync *stateSync, m Member, e *entry) bool {
	losesToIt := !e.Status.isDead() && !e.failedLocally() && m.supersedes(e.Member)
	if !losesToIt {
		return false
	}
	if m.Instance == e.Instance {
		// Adopting that e has failed undid heals: each side of a split would kill the other anew with its old
		// verdicts.
		return m.Status == statusFailed
	}

	// Two clusters meet, and a name lives in both: neither must be called failed for it. Once the holder is dead
	// the claim may come again. A peer that speaks of itself has met the holder, if it dialled, or was compared
	// with it.
	return m.Addr != e.Addr && !m.sameInstance(sync.peer)
}

// probeClaimed probes e, of which another table claims u. It is also told, so that it can refute that, or settle
// it, at once.
func (n *node) probeClaimed(e *entry, u *update, via string) {
	n.sendClaim(e.Member, *u)
	if u.Member.Instance != e.Instance {
		n.detector.probeHolder(n, e.Member, u.Member.Addr)
		return
	}
	if p := n.detector.startProbe(n, e.Member); p != nil {
		p.recordFrom(via, verdictUnreachable)
	}
}

// applyAndForward believes a claim, if it wins, and passes it on.
func (n *node) applyAndForward(u *update) {
	m := u.Member
	e := n.table.get(m.Name)
	believedAlive := e != nil && !e.Status.isDead()
	if m.Status.isDead() && u.age() >= n.cfg.reapAfter && !believedAlive {
		return // members that forget later than this node would bring it back again and again
	}

	otherHolder := e != nil && isOtherAgent(m, e.Member)
	if otherHolder && m.supersedes(e.Member) {
		n.sendClaim(e.Member, *u) // it may live: of two that begin at once, the wrong one may win for a moment
	}

	applied := n.table.apply(n.now, m, u.age())
	if applied == nil {
		return
	}
	applied.noteFirstHeard(n.real) // user events go by the caller's clock: time asleep counts
	n.broadcast(applied)
}

// ---- user events ----

// isValidEvent reports whether u can be a user event or a query.
func isValidEvent(u *update) bool {
	return validatePayload("", u.Name, u.Payload) == nil && u.LTime > 0 && u.LTime <= maxCount
}

// isValidNumber reports whether a user event can have that number, or a member so many of them.
func isValidNumber(number uint64) bool { return number > 0 && number <= 2*maxCount }

// handleUserEvent takes a user event that via has told; replay: also one from before this agent's time.
func (n *node) handleUserEvent(u *update, via string, replay bool) error {
	name := u.Member.Name
	if validName(name) != nil || !isValidEvent(u) || !isValidNumber(u.Number) {
		return fmt.Errorf("sent a bad user event of %q", name)
	}
	e := n.table.get(name)
	if e == nil {
		return nil // the claim about its sender was missed: anti-entropy brings both
	}
	source := e.eventSource(u.Member.Instance)
	if source == nil || !source.isNew(u.id()) {
		return nil
	}
	if e == n.self && source.instance != e.Instance {
		return nil // a former instance of this node has sent it
	}

	isEarly := u.Number > source.number+1
	if isEarly && e == n.self {
		n.skipForetold(source, u.Number)
		return nil
	}
	ev := n.asHeard(e, u, via, replay)
	if isEarly {
		n.holdEvent(e, source, ev)
		return nil
	}
	n.takeEvent(e, source, ev)
	n.forwardEvent(ev)
	n.takeHeld(e, source)
	return nil
}

// skipForetold has this node go on above a number that somebody foretells of its events: otherwise its own would be
// taken for the forged ones.
func (n *node) skipForetold(source *eventSource, number uint64) {
	if number <= source.number+eventWindow {
		n.table.skip(n.self, source, number)
	}
}

// asHeard is the event u of e, which via has told, and whether it runs handlers here.
func (n *node) asHeard(e *entry, u *update, via string, replay bool) heardEvent {
	sent := n.real - time.Duration(min(u.Age, 1<<40))*ms
	// The teller may know better: it was there.
	before := n.isBeforeItsTime(e, sent) && (u.Before || n.isBeforeItsTime(n.table.get(via), sent))

	// Only what belongs to an event goes on: the rest may be of any length.
	clean := update{
		Member:   Member{Name: e.Name, Instance: u.Member.Instance},
		Name:     u.Name,
		Payload:  u.Payload,
		LTime:    u.LTime,
		Coalesce: u.Coalesce,
		Number:   u.Number,
		Nonce:    u.Nonce,
		Before:   before,
	}
	return heardEvent{clean, sent, !before || replay || n.cfg.replay}
}

// holdEvent keeps an event that is ahead of its turn, and passes it on: one that is missing here is missing nowhere
// else for that.
func (n *node) holdEvent(e *entry, source *eventSource, ev heardEvent) {
	gap := n.noteGap(e, source, ev.update.Number)
	if gap == nil || n.broadcasts.heldCount() >= maxEvents {
		return // it has to come again
	}
	isKept := source.hold(ev)
	if isKept {
		n.forwardEvent(ev)
	}
}

// forwardEvent passes on an event that runs handlers here.
func (n *node) forwardEvent(ev heardEvent) {
	if !ev.fresh {
		return
	}
	u := ev.update
	u.Age = uint64((n.real - ev.sent) / ms)
	n.broadcasts.news.add(&u)
}

// isBeforeItsTime reports whether an event was sent before this agent knew e, its sender or the one that tells of it.
// That one was in another cluster then, or this agent was not there yet: a restarted agent would run the handler of
// "reboot" again.
func (n *node) isBeforeItsTime(e *entry, sent time.Duration) bool {
	return e == nil || sent < e.firstHeard
}

// takeEvent counts an event whose turn has come.
func (n *node) takeEvent(e *entry, source *eventSource, ev heardEvent) {
	u := ev.update
	isNext := u.Number > source.number
	// Times are inexact, numbers are not: what follows an event that has run is not before this agent's time.
	if isNext && source.ran {
		u.Before = false
		ev.fresh = true
	}
	if isNext {
		n.table.advance(e, source, u.Number)
	}

	source.remember(u.id())
	n.broadcasts.events.witness(u.LTime)
	n.broadcasts.events.add(u, source, ev.sent)
	n.broadcasts.heardAt = n.now
	if ev.fresh {
		source.ran = true
		n.out.events = append(n.out.events, Event{kind: eventUser, update: u})
	}
}

// takeHeld counts what has waited for its turn, as far as that has come.
func (n *node) takeHeld(e *entry, source *eventSource) {
	for len(source.held) > 0 && source.held[0].update.Number <= source.number+1 {
		ev := source.held[0]
		source.held = source.held[1:]
		if source.isNew(ev.update.id()) {
			n.takeEvent(e, source, ev)
		}
	}
}

// skipEvents gives up the events of e up to number that have not come.
func (n *node) skipEvents(e *entry, source *eventSource, number uint64) {
	n.table.skip(e, source, number)
	n.takeHeld(e, source)
}

// eventGap is a member of whose events some are missing here.
type eventGap struct {
	e       *entry
	source  *eventSource
	upTo    uint64 // the number of the last event that somebody has announced
	counted uint64 // the number of the last that another member is known to have
	number  uint64 // of the last that this node had when it last looked; when that changes, they are coming
	since   time.Duration
	askAt   time.Duration
	tries   int
	away    bool    // the sender is not there to ask
	check   *header // its sender waits for an answer
	from    netip.AddrPort
	size    int
}

// heldCount is how many events wait for their turn.
func (s *broadcasts) heldCount() int {
	count := 0
	for _, g := range s.gaps {
		count += len(g.source.held)
	}
	return count
}

// noteGap notes that events of e up to number have been sent; nil: there are too many gaps.
func (n *node) noteGap(e *entry, source *eventSource, number uint64) *eventGap {
	s := &n.broadcasts
	i := slices.IndexFunc(s.gaps, func(g *eventGap) bool { return g.source == source })
	if i < 0 && len(s.gaps) >= maxEvents {
		return nil
	}
	if i < 0 {
		i = len(s.gaps)
		s.gaps = append(s.gaps, &eventGap{
			e:      e,
			source: source,
			number: source.number,
			since:  n.now,
			askAt:  n.now + eventRepairEvery,
		})
	}
	g := s.gaps[i]
	g.upTo = max(g.upTo, number)
	n.wakeAt(g.askAt)
	return g
}

// stepGaps asks for events that do not come, and gives them up when nobody has them.
func (s *broadcasts) stepGaps(n *node) {
	open := s.gaps[:0]
	for _, g := range s.gaps {
		if g.source.number < g.upTo {
			g.step(n)
		}
		switch {
		case g.source.number < g.upTo && !g.isVain():
			open = append(open, g)
		case g.source.number >= g.upTo && g.check != nil:
			n.sendAck(g.from, *g.check, g.size)
		}
	}
	clear(s.gaps[len(open):])
	s.gaps = open
}

func (g *eventGap) step(n *node) {
	away := g.e.isSkipped() || g.e.Instance != g.source.instance
	if away != g.away || g.source.number != g.number {
		g.away = away
		g.number = g.source.number
		g.since = n.now
		g.askAt = n.now + eventRepairEvery
		g.tries = 0
	}

	timeout := eventGapTimeout
	if g.away {
		timeout = eventAwayTimeout
	}
	if n.now >= g.since+timeout {
		g.giveUp(n)
	}

	// All that are there have been asked when the sender is away: only a split that ends can bring what they have not.
	if g.away && g.tries >= eventAwayTries {
		n.wakeAt(g.since + timeout)
		return
	}
	if n.now >= g.askAt {
		g.askAt = n.now + eventRepairEvery
		g.ask(n)
	}
	n.wakeAt(g.askAt)
}

// giveUp goes on without the events that are missing before the next one that is there.
func (g *eventGap) giveUp(n *node) {
	end := g.upTo
	if len(g.source.held) > 0 {
		end = g.source.held[0].update.Number - 1
	}
	n.logf(levelDebug, "%d user events of %s are given up: nobody has them", end-g.source.number, g.e.Name)
	n.skipEvents(g.e, g.source, end)
	g.since = n.now
}

// isVain reports whether there is nothing to wait for: the sender, which is gone, had announced events, but nobody is
// known to have got one of them.
func (g *eventGap) isVain() bool {
	return g.away && g.tries >= eventAwayTries && g.counted <= g.source.number && len(g.source.held) == 0
}

// handleEventRequest sends e the user events that follow the one that it names, as far as they are remembered.
func (n *node) handleEventRequest(e *entry, us []update) error {
	if len(us) != 1 || validName(us[0].Member.Name) != nil {
		return errors.New("sent a bad request for events")
	}
	allowed := e.peer().eventRate.takeEvery(time.Second/eventRepairRate, 2, n.now)
	if !allowed {
		return nil
	}
	var body []byte
	packets := 0
	for _, ev := range n.broadcasts.events.recent {
		wanted := ev.Member.sameInstance(us[0].Member) && ev.Number > us[0].Number
		if !wanted || packets == eventRepairPackets {
			continue
		}
		u := ev.update
		u.Age = uint64((n.real - ev.sent) / ms)
		one := wire.encode(nil, &u)
		if len(body) > 0 && len(body)+len(one) > maxDatagram-256 {
			n.send(e.Member, n.header(msgBroadcast), body)
			packets++
			body = nil
		}
		body = append(body, one...)
	}
	if len(body) > 0 && packets < eventRepairPackets {
		n.send(e.Member, n.header(msgBroadcast), body)
	}
	return nil
}

// ask asks the sender, which has what is missing for certain, and members at random, which may be nearer and outlive
// it.
func (g *eventGap) ask(n *node) {
	g.tries++
	to := g.e
	if g.away || g.tries%2 == 1 {
		to = n.randomMember(n.table.ring[0], func(e *entry) bool { return !e.isSkipped() })
	}
	if to == nil || to == n.self {
		return
	}
	if g.tries%(eventRepairTries+1) == 0 {
		n.antiEntropy.requestEvents(n, to)
		return
	}
	last := update{Member: Member{Name: g.e.Name, Instance: g.source.instance}, Number: g.source.number}
	n.send(to.Member, n.header(msgEventRequest), wire.encode(nil, &last))
}

// userEvent sends a user event to everybody, this node included. errEventsWait: the others have to catch up first.
func (n *node) userEvent(name string, payload []byte, coalesce bool) error {
	if err := validatePayload("event", name, payload); err != nil {
		return err
	}
	flow, source := &n.broadcasts.flow, n.self.eventSource(n.self.Instance)
	if source.number-flow.known(n.self) >= eventWindow {
		return errEventsWait
	}
	ev := heardEvent{
		update: update{
			Member:   Member{Name: n.self.Name, Instance: n.self.Instance},
			Name:     name,
			Payload:  payload,
			Coalesce: coalesce,
			LTime:    min(n.broadcasts.events.lamport+1, maxCount),
			Number:   source.number + 1,
			Nonce:    n.nonce(),
		},
		sent:  n.real,
		fresh: true,
	}
	n.takeEvent(n.self, source, ev)
	n.forwardEvent(ev)
	return nil
}

// resendEvents sends the remembered events of this node, which has just joined, to all that are there now.
func (n *node) resendEvents() {
	source := n.self.eventSource(n.self.Instance)
	isFormer := func(ev bufferedEvent) bool {
		return ev.Member.Name == n.self.Name && ev.Member.Instance != n.self.Instance
	}
	if slices.ContainsFunc(n.broadcasts.events.recent, isFormer) { // its address has changed since then
		n.table.advance(n.self, source, 0)
	}
	for i := range n.broadcasts.events.recent {
		ev := &n.broadcasts.events.recent[i]
		if ev.Member.Name != n.self.Name {
			continue
		}
		if ev.Member.Instance != n.self.Instance {
			ev.Member.Instance = n.self.Instance
			ev.source.kept--
			ev.source = source
			source.kept++
			source.remember(ev.id())
			n.table.advance(n.self, source, ev.Number)
		}
		ev.sent = n.real
		n.broadcasts.news.add(&ev.update)
	}
}

// eventFlow bounds how many of this node's user events are under way. Floods are not acknowledged. When half of the
// window is used up, every member is asked to answer as soon as it has all.
type eventFlow struct {
	instance  uint64
	settled   uint64 // all members have the events up to this one, or are not waited for
	asked     uint64 // when it is higher: they have been asked for those up to this one
	until     time.Duration
	waiting   []Member // who has not answered
	confirmed int      // how many have
}

// known is how many events of self everybody has.
func (f *eventFlow) known(self *entry) uint64 {
	if f.instance != self.Instance {
		*f = eventFlow{instance: self.Instance}
	}
	return f.settled
}

// checked is told that e has all events for which it was asked.
func (f *eventFlow) checked(e *entry) {
	e.peer().lagging = false
	f.confirmed++
	f.waiting = slices.DeleteFunc(f.waiting, e.sameInstance)
}

func (f *eventFlow) step(n *node) {
	count := n.self.eventCount()
	if f.asked > f.known(n.self) {
		f.waiting = slices.DeleteFunc(f.waiting, n.table.ended)
		if len(f.waiting) > 0 && n.now < f.until {
			n.wakeAt(f.until)
			return
		}
		f.conclude(n)
	}

	outside := n.joining.joinedAt == 0 && len(n.cfg.seeds) > 0
	if count-f.settled >= eventWindow/2 && !outside && !n.detector.isolated {
		f.ask(n, count)
	}
}

// conclude ends a check. One that is stopped must not stop the others: it will catch up by itself. But if nobody at
// all has answered, nothing is known to have arrived.
func (f *eventFlow) conclude(n *node) {
	if len(f.waiting) > 0 && f.confirmed == 0 {
		f.asked = f.settled
		return
	}
	for _, m := range f.waiting {
		n.table.get(m.Name).peer().lagging = true
	}
	f.settled = f.asked
}

// ask asks all members for the events up to count. Those that did not keep up are asked, too, but not waited for while
// others are.
func (f *eventFlow) ask(n *node, count uint64) {
	f.asked = count
	f.until = n.now + eventCheckTimeout
	f.waiting = nil
	f.confirmed = 0
	var lagging []Member
	hdr := n.header(msgEventCheck)
	body := wire.encode(nil, &update{Number: count})
	for _, e := range n.table.ordered {
		if e == n.self || e.displayStatus() != statusAlive {
			continue
		}
		n.sendReliable(e.Member, hdr, body, eventCheckTimeout)
		if e.peer().lagging {
			lagging = append(lagging, e.Member)
		} else {
			f.waiting = append(f.waiting, e.Member)
		}
	}
	if len(f.waiting) == 0 {
		f.waiting = lagging
	}
	n.wakeAt(n.now)
}

// handleEventCheck answers e as soon as all of its user events up to the one that it names have come.
func (n *node) handleEventCheck(e *entry, from netip.AddrPort, hdr header, size int, us []update) error {
	if len(us) != 1 || !isValidNumber(us[0].Number) {
		return errors.New("sent a bad check of its events")
	}
	source := e.eventSource(e.Instance)
	if source.number >= us[0].Number {
		n.sendAck(from, hdr, size)
		return nil
	}
	if g := n.noteGap(e, source, us[0].Number); g != nil {
		g.check = &hdr
		g.from = from
		g.size = size
	}
	return nil
}

// ---- anti-entropy ----

// antiEntropy compares tables with a peer whose digest differs, and forgets the dead.
type antiEntropy struct {
	peer   *entry // with which the next state sync is planned; nil: none is
	at     time.Duration
	digest uint64 // that differed
	rate   bucket
	reapAt time.Duration
}

// requestSync plans a state sync with e, whose digest differs.
func (r *antiEntropy) requestSync(n *node, e *entry, digest uint64) {
	// What the last state sync left different stays so: two that forget the dead after different times would
	// compare tables for ever.
	if r.peer != nil || e.peer().syncedDigests == digest^n.digest() {
		return
	}
	allowed := r.rate.takeEvery(syncInterval, syncBurst, n.now)
	if !allowed {
		return
	}
	// The random wait lets a broadcast that is under way arrive first.
	r.plan(e, digest, n.now+20*ms+n.jitter(100*ms))
}

// requestEvents plans a state sync with e, which has user events that have not come.
func (r *antiEntropy) requestEvents(n *node, e *entry) {
	if r.peer != nil || e.isSkipped() || e == n.self {
		return
	}
	allowed := r.rate.takeEvery(syncInterval, syncBurst, n.now)
	if allowed {
		r.plan(e, 0, n.now)
	}
}

func (r *antiEntropy) plan(e *entry, digest uint64, at time.Duration) {
	r.peer = e
	r.digest = digest
	r.at = at
}

// syncNow compares tables with m, as often as tables may be compared.
func (r *antiEntropy) syncNow(n *node, m Member) {
	allowed := r.rate.takeEvery(syncInterval, syncBurst, n.now)
	if allowed {
		n.sync(m)
	}
}

// handleUnknownHeartbeat handles a heartbeat that does not count, since its sender is not remembered.
func (n *node) handleUnknownHeartbeat(e *entry, hdr header) {
	if hdr.Kind != msgHeartbeat || e == n.self {
		return
	}
	former := e != nil && hdr.Incarnation <= e.Incarnation
	if former {
		return
	}

	// The sender has this node for a watcher, so this node has missed its news. Where all that would pass
	// them on are as new, nothing of theirs counts here, and no broadcast of theirs comes. Of a hundred who joined
	// within moments some took 0.4 s, and 0.2 s with this.
	inTouch := func(e *entry) bool { return !e.isSkipped() && e.isValidated() }
	if other := n.randomMember(n.table.ring[0], inTouch); other != nil {
		n.antiEntropy.requestSync(n, other, hdr.Digest)
	}
}

func (r *antiEntropy) step(n *node) {
	if r.peer != nil {
		r.stepSync(n)
	}
	// Often, since digests differ until all members have forgotten a dead one.
	if n.now >= r.reapAt {
		r.reapAt = n.now + n.reapInterval()
		n.table.reap(n.now, n.cfg.reapAfter)
		n.broadcasts.events.trim(n.real - eventMemory)
	}
}

// stepSync starts the planned state sync when it is due, if the tables still differ.
func (r *antiEntropy) stepSync(n *node) {
	if n.now < r.at {
		n.wakeAt(r.at)
		return
	}
	if !r.peer.Status.isDead() && !n.agreesWith(r.digest) {
		n.sync(r.peer.Member)
	}
	r.peer = nil
}

// stateSync is one comparison of tables, as the node sees it: the dialler sends its own, and then the acceptor.
// A table goes in chunks, in the order of keys, so that none stalls the loop.
type stateSync struct {
	peer      Member        // that answered or dialled, once known; its Addr is the one that was dialled
	from      netip.Addr    // from where it dialled
	roundTrip time.Duration // to it; 0: not known
	joins     bool          // it was dialled to join, by a command or as a seed
	byCommand bool          // by a command, which fails where this node's name is taken
	replay    bool
	lastKey   string // the next chunk begins after this key
	digest    uint64 // the other side's, at first
	tables    int    // done, of three: the dialler's, the acceptor's, and events that only the dialler has
	counts    []eventCount
	known     map[lifetime]uint64 // the same, by instance
}

// lifetime is one instance of a member.
type lifetime struct {
	name     string
	instance uint64
}

// eventCount is how many of an instance's user events the other side knows.
type eventCount struct {
	of     lifetime
	number uint64
}

// handshakeReply answers a first frame: with this node's digest, and with the claim about the other's name. A
// newcomer whose name is taken must learn it before it says more.
func (n *node) handshakeReply(hdr header) (w header, about []update) {
	e := n.table.get(hdr.From)
	if e != nil && !e.local.reaped {
		n.noteNamesake(e, hdr)
		about = append(about, n.claim(e))
	}
	return n.header(msgHandshakeReply), about
}

// noteNamesake looks whether another agent of the name of e has dialled.
func (n *node) noteNamesake(e *entry, hdr header) {
	at, err := netip.ParseAddrPort(hdr.Target)
	isOther := isOtherAgent(Member{Instance: hdr.instance(), Addr: at}, e.Member)
	switch {
	case err != nil || !isOther:
	case e == n.self:
		n.identity.warnOfConflict(n, e.Member, at)
	case hdr.Kind == msgSync: // it is kept out while e counts as alive, so whether e is there is found out at once
		n.detector.probeHolder(n, e.Member, at)
	}
}

// handleWelcome takes the dialled peer's first answer: who it is, and what it believes about this node's name.
func (n *node) handleWelcome(sync *stateSync, hdr header, about []update) error {
	if hdr.From == n.self.Name && hdr.instance() == n.self.Instance {
		return errSelf
	}
	sync.peer.Name = hdr.From
	sync.peer.Instance = hdr.instance()
	sync.digest = hdr.Digest
	n.detector.heardFrom(n.now)

	e := n.table.get(hdr.From)
	isMember := e != nil && e != n.self && !e.failedLocally()
	if isMember && isOtherAgent(sync.peer, e.Member) {
		// Two others share a name. This is not errNameTaken, which ends a newcomer: its own name is free.
		n.detector.probeHolder(n, e.Member, sync.peer.Addr)
		return errors.New(nameTaken(e.Member).Error())
	}
	for _, u := range about {
		if hdr.From == n.self.Name {
			u.Member.Addr = sync.peer.Addr // the peer is the other holder: it lives where it answers
		}
		err := n.sanitizeClaim(&u)
		if err != nil || u.Member.Name != n.self.Name || !n.isPlausibleClaim(u.Member, n.self, sync) {
			continue
		}
		if err := n.identity.resolveNameConflict(n, sync, u, hdr); err != nil {
			return err
		}
	}

	n.identity.noteLetIn(n, hdr.More)
	return nil
}

// tableChunk is the next frame of this node's table, members first: an empty one, if the tables are the same by
// now.
func (n *node) tableChunk(sync *stateSync) (frame []byte, more bool) {
	hdr := n.header(msgTable)
	c := chunk{lastKey: sync.lastKey}
	differs := sync.digest != n.digest() // the news may have come between two chunks
	if differs && sync.tables < 2 {
		n.addMembers(&c)
	}
	// The dialler does not know yet which events the other side has, and sends them when it has heard that.
	if differs && sync.tables > 0 {
		n.addEvents(&c, sync)
	}

	if c.full {
		sync.lastKey = c.lastKey
		hdr.Target = c.lastKey
		hdr.More = true
	} else {
		sync.endTable()
	}
	return append(wire.encode(nil, &hdr), c.body...), c.full
}

// chunk is a part of a table on its way into one frame.
type chunk struct {
	body    []byte
	lastKey string // of what is in it, or was in the chunks before
	full    bool   // something has found no room
}

func (c *chunk) add(u update, key string) {
	longer := wire.encode(c.body, &u)
	if len(longer) > maxFrame-512 {
		c.full = true
		return
	}
	c.body = longer
	c.lastKey = key
}

// addMembers adds the claims about the members after the last key.
func (n *node) addMembers(c *chunk) {
	at, _ := n.table.index(c.lastKey + "\x00") // the least name that is greater
	for _, e := range n.table.ordered[at:] {
		if c.full {
			return
		}
		contested := e == n.self && n.detector.rivalProbe(n) != nil
		if e.local.reaped || contested {
			continue
		}
		u := n.claim(e)
		u.Number = e.eventCount()
		if former := e.formerEvents(); former != nil {
			u.Former = former.instance
			u.FormerNumber = former.number
		}
		c.add(u, u.Member.Name)
	}
}

// addEvents adds the remembered events after the last key that the other side lacks.
func (n *node) addEvents(c *chunk, sync *stateSync) {
	recent := n.broadcasts.events.recent
	for i := range recent {
		if c.full {
			return
		}
		ev := &recent[i]
		key := fmt.Sprintf("\xff%016x", ev.position) // no name begins so
		if key <= c.lastKey || !sync.wantsEvent(ev, len(recent)-i) {
			continue
		}
		u := ev.update
		u.Age = uint64((n.real - ev.sent) / ms)
		c.add(u, key)
	}
}

// wantsEvent reports whether the other side lacks an event, as far as is known; age counts the ones after it.
func (x *stateSync) wantsEvent(ev *bufferedEvent, age int) bool {
	known, ok := x.known[lifetime{ev.Member.Name, ev.Member.Instance}]
	if !ok {
		return age <= keptEvents // it does not know the sender, and so was not there: it gets what all remember
	}
	return ev.Number > known
}

// endTable notes that a table has gone, or has come, whole.
func (x *stateSync) endTable() {
	x.lastKey = ""
	x.tables++
}

// noteCounts notes how many events of a member the other side knows: of the instance of claim u, and of a former
// one.
func (n *node) noteCounts(sync *stateSync, u *update) {
	if u.Name != "" {
		return
	}
	if sync.known == nil {
		sync.known = make(map[lifetime]uint64)
	}
	sync.noteCount(lifetime{u.Member.Name, u.Member.Instance}, u.Number)
	if u.FormerNumber > 0 {
		sync.noteCount(lifetime{u.Member.Name, u.Former}, u.FormerNumber)
	}

	// Claims come before events: so the events of an instance that came and went unnoticed find their place.
	e := n.table.get(u.Member.Name)
	if e == nil {
		return
	}
	if u.Number > 0 && e.knownEvents(u.Member.Instance) == nil {
		e.addFormer(u.Member.Instance)
	}
	if u.FormerNumber > 0 && e.knownEvents(u.Former) == nil {
		e.addFormer(u.Former)
	}
}

func (x *stateSync) noteCount(l lifetime, number uint64) {
	x.known[l] = number
	x.counts = append(x.counts, eventCount{l, number})
}

// mergeChunk takes a chunk of the other side's table; more says that others follow. One bad record costs that
// record; bad is how many there were.
func (n *node) mergeChunk(sync *stateSync, hdr header, us []update) (more bool, bad int, err error) {
	if hdr.Kind != msgTable {
		return false, 0, errMalformed
	}
	bringsNothing := len(us) == 0 || hdr.Target <= sync.lastKey
	if hdr.More && bringsNothing { // a peer could go on like that for ever
		return false, 0, errMalformed
	}

	n.detector.heardFrom(n.now)
	for _, u := range us {
		claim := u // what is handled loses all that does not belong to a claim
		err := n.handleUpdate(&claim, sync.peer.Name, sync)
		if err != nil {
			bad++
			continue
		}
		n.noteCounts(sync, &u)
	}

	sync.lastKey = hdr.Target
	if !hdr.More {
		sync.endTable()
		n.takeCounts(sync)
		n.noteSynced(sync)
	}
	return hdr.More, bad, nil
}

// noteSynced notes that a peer has answered at the address of its session: it need not answer a datagram first.
// One that has dialled may be far away, and know no other yet: it is asked for its digest, which tells what it has
// missed.
func (n *node) noteSynced(sync *stateSync) {
	n.joining.noteJoined(n, sync.peer.Addr.IsValid())
	e := n.table.get(sync.peer.Name)
	if e == nil || e == n.self || e.Instance != sync.peer.Instance {
		return
	}
	if e.Addr == sync.peer.Addr {
		n.noteValidated(e)
	}
	if e.Addr.Addr() != sync.from {
		return
	}

	// A joiner that dialled from the host that it advertises may be told the news. But its port is not validated:
	// what it advertises may lead to nobody, or to another one.
	n.noteHostValidated(e)
	if !e.peer().line.isSettled(n.now) {
		n.pingAtBoundedRate(e)
	}
}

// takeCounts takes how many events of each member the other side knows, when all that it remembers of them has
// come.
func (n *node) takeCounts(sync *stateSync) {
	if sync.tables == 1 {
		return // the acceptor gets the dialler's events at the end
	}
	for _, c := range sync.counts {
		e := n.table.get(c.of.name)
		if e == nil {
			continue
		}
		source := e.eventSource(c.of.instance)
		switch {
		case source == nil:
		case c.number <= source.number:
		case n.joining.joinedAt == 0 && e != n.self: // a newcomer: what has not come is before its time
			n.skipEvents(e, source, min(c.number, maxCount))
		case c.number > source.number+countStep:
		case e == n.self: // somebody has foretold events of this node, which goes on above them
			n.skipEvents(e, source, c.number)
		default: // the other side may have come later than they, and have none of them: others do
			if g := n.noteGap(e, source, c.number); g != nil {
				g.counted = max(g.counted, c.number)
			}
		}
	}
}

// syncDone notes that a state sync that this node has dialled went well.
func (n *node) syncDone(sync *stateSync) {
	n.noteSynced(sync)
	for _, e := range n.table.ordered {
		n.table.setIsolated(n.now, e, false) // the other side would have said so
	}

	e := n.table.get(sync.peer.Name)
	if e == nil || e == n.self {
		return
	}
	n.detector.noteAnswered(n, e) // wherever
	e.peer().syncedDigests = sync.digest ^ n.digest()

	at := sync.peer.Addr
	reachedElsewhere := e.Addr != at && e.Instance == sync.peer.Instance
	if reachedElsewhere && e.peer().path.reachedAt != at {
		e.peer().path.reachedAt = at
		n.logf(levelInfo, "%s was reached at %s and advertises %s", e.Name, at, e.Addr)
	}
}

// ---- joining ----

// joining is when to try the seeds. To try one is to look it up and to sync with its addresses. Each seed is tried
// on its own: a name that is slow to resolve, or a host that is far away, must not hold up the others.
type joining struct {
	joinedAt time.Duration // when this node first came in, on the caller's clock; 0: not yet
	memberAt time.Duration // when a seed was last an alive member, or this node began
	seeds    []seed        // in the order of nodeConfig.seeds
	failing  bool          // it was reported that no seed answers
	warned   rareWarning
}

// seed is what is known of one seed.
type seed struct {
	nextTry time.Duration // never: a try is under way
	tries   int           // of a newcomer, all have failed
	last    seedResult
}

// seedResult is what one try of a seed has brought.
type seedResult struct {
	names  []string // members that answered at the seed's addresses
	errs   []string // "ADDR: reason" of what did not answer; one address that answers is enough
	isSelf bool     // this node itself is what answered
	taken  error    // another member has this node's name
}

// noteJoined notes that this node is in a cluster, to which it has dialled or which has dialled it.
func (j *joining) noteJoined(n *node, dialled bool) {
	if j.joinedAt != 0 {
		return
	}
	j.joinedAt = max(n.real, 1)
	n.broadcast(n.self)
	// What this node has sent alone is of its own past if others come to it, and counts as sent now if it came to
	// them.
	if dialled || len(n.cfg.seeds) > 0 {
		n.resendEvents()
	}
}

// step tries the seeds that are due, unless one of them is an alive member.
func (j *joining) step(n *node) {
	for _, s := range j.seeds {
		if s.isMember(n) {
			j.memberAt = n.now
			return
		}
	}

	// This goes on for ever, or two halves of a cluster might stay apart.
	for i := range j.seeds {
		s := &j.seeds[i]
		if n.now >= s.nextTry {
			n.out.seeds = append(n.out.seeds, i)
			s.nextTry = never
		}
		n.wakeAt(s.nextTry)
	}
}

// isMember reports whether an alive member has answered at the seed.
func (s seed) isMember(n *node) bool {
	for _, name := range s.last.names {
		e := n.table.get(name)
		if e != nil && e != n.self && e.displayStatus() == statusAlive {
			return true
		}
	}
	return false
}

// handleSeedTried takes the result of trying the seed with index i.
func (j *joining) handleSeedTried(n *node, i int, r seedResult) {
	s := &j.seeds[i]
	s.last = r
	wait := j.wait(n.now)
	s.nextTry = n.now + wait - n.jitter(wait/4)

	isNewcomer := j.joinedAt == 0
	if errors.Is(r.taken, errNameHeld) {
		s.nextTry = n.now + nameRetry // it is free as soon as the cluster has noticed that its holder is gone
		return
	}
	s.tries++
	switch {
	case isNewcomer && errors.Is(r.taken, errNameTaken):
		n.out.fatal = r.taken
	case isNewcomer && j.hasGivenUp(n.cfg.retryMax):
		n.out.fatal = fmt.Errorf("no seed answered in %d rounds (%s)", n.cfg.retryMax, j.errors(5))
	default:
		j.report(n)
	}
}

// wait is how long to wait after a try. At first one a second costs nothing, and clusters start in any order. When
// no seed has been an alive member for long, they are tried more and more rarely.
func (j *joining) wait(now time.Duration) time.Duration {
	missing := now - j.memberAt
	later := (missing - seedsOftenFor) / 2
	return min(max(missing, 250*ms), max(later, seedsOften), seedsMax)
}

// hasGivenUp reports whether a newcomer has tried each seed as often as the user allows.
func (j *joining) hasGivenUp(retryMax int) bool {
	for _, s := range j.seeds {
		if s.tries < retryMax {
			return false
		}
	}
	return retryMax > 0
}

// report logs how it stands with the seeds, once each of them has been tried.
func (j *joining) report(n *node) {
	var answered string
	dead := false
	for _, s := range j.seeds {
		switch {
		case len(s.last.names) > 0:
			answered = s.last.names[0]
		case len(s.last.errs) == 0: // the first try is under way
			return
		case !s.last.isSelf:
			dead = true
		}
	}

	wasFailing := j.failing
	j.failing = answered == ""
	if wasFailing && !j.failing {
		n.logf(levelInfo, "joined through %s", answered)
	}
	switch {
	case dead && !j.failing:
		n.warnRarely(&j.warned, "not all seeds answer (%s)", j.errors(5))
	case dead:
		n.warnRarely(&j.warned, "no seed answers (%s): trying on, at most every %v", j.errors(5), seedsMax)
	case j.failing && !wasFailing: // one list of seeds for all is usual, and some node is the first on it
		n.logf(levelInfo, "no seed answers but this node itself (%s)", j.errors(5))
	}
}

// errors are what is wrong with the seeds, at most limit of them.
func (j *joining) errors(limit int) string {
	var errs []string
	for _, s := range j.seeds {
		errs = append(errs, s.last.errs...)
	}
	return strings.Join(errs[:min(len(errs), limit)], "; ")
}

// ---- identity ----

// identity is what concerns this node's own record.
//
// Of others that have this node's name, a holder has it where a newcomer wants to join, a rival is alive as this
// member is, and a former one was found gone. Whoever lives at this node's address is this node, before a restart.
type identity struct {
	seedAnswered bool          // a seed has answered: it is known which address leads there
	answering    uint64        // the instance of a holder of this newcomer's name that answers
	former       Member        // another holder of the name, or a former self, that was found gone
	formerSince  time.Duration // when it was
	leaving      time.Duration // until when the leave may take; 0: it does not leave

	rival      uint64        // the instance of another living agent of the name
	rivalSince time.Duration // when it came into its cluster, as far as is known
	rivalMet   int           // how often

	addressWarned  rareWarning // see warnOfAddress
	conflictWarned rareWarning
}

func nameTaken(holder Member) error {
	return fmt.Errorf("the name %q %w: the member at %s has it", holder.Name, errNameTaken, holder.Addr)
}

// resolveNameConflict decides whether u, which a dialled peer believes of this node's name, keeps this node out of
// the peer's cluster.
//
// A name belongs to the agent that has been in the cluster for longer, as its members know it: ages are told,
// never times, since a clock may be wrong. A newcomer never takes the name of one that is in the cluster. Of two
// that are in, after a split, the younger gives way: the tables say the same as u; see conflictResolved.
func (o *identity) resolveNameConflict(n *node, sync *stateSync, u update, hdr header) error {
	holder := u.Member
	comesIntoCluster := n.joining.joinedAt == 0 && hdr.More
	isContested := isOtherAgent(n.self.Member, holder) || n.detector.rivalProbe(n) != nil
	switch {
	case sync.byCommand && o.mayBeRival(n.self.Member, holder):
		return nameTaken(holder)
	case comesIntoCluster && isContested:
		return o.awaitName(n, sync, holder)
	case !o.mayBeRival(n.self.Member, holder):
		o.handleSelfClaim(n, u, hdr.From)
	}
	return nil
}

// noteLetIn is told that nothing keeps this node from joining a peer that it has dialled.
func (o *identity) noteLetIn(n *node, isCluster bool) {
	o.seedAnswered = true
	if isCluster && n.joining.joinedAt == 0 {
		n.self.since = n.now // this is when the node comes in
	}
}

// awaitName has the holder of a newcomer's name probed. If it answers, the name is taken. Otherwise the newcomer
// waits for the cluster's verdict: the holder may have stalled, or only this node cannot reach it.
func (o *identity) awaitName(n *node, sync *stateSync, holder Member) error {
	answers := sync.peer.Name == n.self.Name || holder.Instance == o.answering
	clusterReachesIt := n.now-o.formerSince > nameHeldTimeout
	switch {
	case n.detector.rivalProbe(n) != nil: // its result comes first
	case answers:
		return nameTaken(holder)
	case o.mayBeRival(n.self.Member, holder):
		p := n.detector.startProbe(n, holder)
		if p != nil {
			p.noteRoundTrip(sync.roundTrip) // a newcomer knows no other line
		}
	case clusterReachesIt:
		return nameTaken(holder)
	}
	return fmt.Errorf("the name %q %w: the member at %s has it", holder.Name, errNameHeld, holder.Addr)
}

// givesWay reports whether this node leaves its name to the rival: whether it came in later.
func (o *identity) givesWay(n *node) bool {
	later := n.self.since - o.rivalSince
	if later > 0 {
		return true // an age only ever shrinks on its way, so the two never both give way
	}
	// Neither does if they came in at the same time, but for what the way takes. Then, when the one that may know
	// better has had the time to, the higher instance does.
	atOnce := later > -nameTie && o.rivalMet >= 3
	return atOnce && n.self.Instance > o.rival
}

// warnOfConflict says that two agents have one name: at the holder, and at those that were told of both.
func (o *identity) warnOfConflict(n *node, holder Member, other netip.AddrPort) {
	n.warnRarely(&o.conflictWarned,
		"two agents are called %q, at %s and at %s: give one of them another name with -node",
		holder.Name, holder.Addr, other)
}

// handleSelfClaim handles a claim about this node, which via has made. Where it may be about another living agent
// (a rival), that one is probed. Any other is false, or a clock went back, and it is refuted with a higher
// incarnation.
func (o *identity) handleSelfClaim(n *node, u update, via string) {
	m := u.Member
	if o.leaving != 0 || m == n.self.Member {
		return
	}
	if o.mayBeRival(n.self.Member, m) {
		if o.rival != m.Instance {
			o.rivalMet = 0
		}
		o.rival = m.Instance
		o.rivalSince = n.now - u.age()
		o.rivalMet++
		n.detector.startProbe(n, m)
		return
	}

	e := n.table.get(via)
	missedRefutation := m.Incarnation < n.self.Incarnation
	if !missedRefutation {
		o.refute(n, m.Incarnation)
	}
	// Who does not get the broadcast of the refutation is told directly: it stays on its own side of a split.
	isTold := !missedRefutation && slices.Contains(n.broadcasts.receivers(n), e)
	if e != nil && e != n.self && !isTold {
		n.sendClaim(e.Member, n.claim(n.self))
	}
}

// isOtherAgent reports whether holder, which is believed alive, is another agent than m, which has its name too: one
// that comes back at its address has only restarted.
func isOtherAgent(m, holder Member) bool {
	return holder.Instance != m.Instance && holder.Addr != m.Addr && !holder.Status.isDead()
}

// mayBeRival reports whether m can be another living agent with the name of self.
func (o *identity) mayBeRival(self, m Member) bool {
	// One that was found gone and has raised its incarnation since then was only stopped or cut off: two would
	// claim the name for ever.
	foundGone := m.Instance == o.former.Instance && m.Incarnation <= o.former.Incarnation
	return isOtherAgent(self, m) && !foundGone
}

// refute takes an incarnation above the one that is claimed, and tells everybody.
func (o *identity) refute(n *node, claimed uint64) {
	m := n.self.Member
	m.Incarnation = max(m.Incarnation, claimed) + 1
	n.logf(levelDebug, "refuting what is said of this node, incarnation %d", m.Incarnation)
	n.applyAndBroadcast(m)
}

// conflictResolved settles what becomes of the name once the probe of m, another holder, is over.
func (o *identity) conflictResolved(n *node, m Member, alive bool) {
	isNewcomer := n.joining.joinedAt == 0
	switch {
	case alive && isNewcomer:
		o.answering = m.Instance // the next join that meets it fails
		return
	case alive && o.givesWay(n):
		n.out.fatal = nameTaken(m)
		return
	case alive:
		o.warnOfConflict(n, n.self.Member, m.Addr)
		n.sync(m) // it does not count the datagrams of an instance that it does not know
	case isNewcomer:
		n.logf(levelInfo, "the member at %s has the name of this node and does not answer: "+
			"waiting until the cluster calls it failed", m.Addr)
	}
	if !alive {
		o.former = m
		o.formerSince = n.now
	}
	o.refute(n, m.Incarnation)
}

// addressChanged is told from which address this node has dialled. gone: what it advertises is no longer an
// address of this machine; joins: it has dialled for a join.
func (o *identity) addressChanged(n *node, ip netip.Addr, gone, joins bool, unixMs uint64) {
	m := n.self.Member
	settles := joins && !o.seedAnswered && n.joining.joinedAt == 0 // the way to the first seed that answers
	moves := (settles || gone) && ip != m.Addr.Addr()
	if !moves || o.leaving != 0 {
		return
	}

	// To the others this is a restart.
	o.former = m
	o.formerSince = n.now
	m.Addr = netip.AddrPortFrom(ip, m.Addr.Port())
	m.Instance = max(newInstanceID(unixMs, n.rng.Uint64()), m.Incarnation+1)
	m.Incarnation = m.Instance
	n.logf(levelInfo, "this node has the address %s now and advertises it", ip)

	events := n.table.events
	age := n.now - n.self.since // it has been in the cluster all the time
	n.broadcast(n.table.apply(n.now, m, age))
	n.table.events = events // it has neither failed nor joined for itself
}

// setTags sets the tags in set, then drops those that drop names.
func (o *identity) setTags(n *node, set map[string]string, drop []string) error {
	kv := n.self.Tags.asMap()
	maps.Copy(kv, set)
	for _, key := range drop {
		delete(kv, key)
	}
	tags, err := makeTags(kv)
	if err != nil || tags == n.self.Tags {
		return err
	}

	m := n.self.Member
	m.Tags = tags
	m.Incarnation++
	n.applyAndBroadcast(m)
	return nil
}

// startLeave tells the watchers that this node leaves. It has left when all of them know, or when their time is
// over.
func (o *identity) startLeave(n *node) {
	within := max(leaveTimeout, 3*n.longestRoundTrip()) // time to send it again
	o.leaving = n.now + within
	n.requests.removeAll() // the leave waits for nothing but its own
	left := wire.encode(nil, &update{Member: n.self.with(statusLeft)})
	for _, w := range n.heartbeats.watchers {
		n.sendReliable(w.Member, n.header(msgBroadcast), left, within)
	}
}

// ---- heartbeats ----

// heartbeats is whom this node watches, and its own watchers.
//
// The watchers are a queue: the first one is sent the next heartbeat, and goes to the end. Each heartbeat promises
// the next one by the watcher's place in the queue, and a watcher only ever moves forward in it. So no promise is
// broken, whatever happens to the others.
type heartbeats struct {
	version  uint64   // version of the table that this follows
	watchers []*entry // in the order of the rings
	queue    []*entry // the same
	watched  []*entry
	nextBeat time.Duration // on the caller's clock: the watchers' time goes on while this node is stopped
	early    int           // beats after the next one that come early
	links    []Member      // the watch links that were asked for last
	linkAt   time.Duration // when to ask for others; never: they are as they should be
}

// refresh recomputes whom this node watches, and its watchers, after a change.
func (r *heartbeats) refresh(n *node) {
	if r.version == n.table.version {
		return
	}
	// After a mass failure the rings must heal at once, so a newly watched member is due soon. After a join
	// nothing is broken, and all members are busy.
	grace := newWatchGrace
	if n.table.shrunk > r.version {
		grace = overdueAfter
	}
	r.version = n.table.version
	r.watchers = n.table.watchers(n.self)

	formerlyWatched := r.watched
	r.watched = n.table.watched(n.self)
	for _, e := range r.watched {
		peer := e.peer()
		if peer.due == 0 || !slices.Contains(formerlyWatched, e) {
			peer.due = n.now + max(grace, 2*n.roundTripTo(e.Member)) // it learns of this, and says so
		}
	}
	r.requeue(n)
	r.planLinks(n)
}

// requeue drops the former watchers from the queue, and greets the new ones at its end: the greeting is a
// heartbeat.
func (r *heartbeats) requeue(n *node) {
	// Another instance of a watcher has not been greeted.
	isFormer := func(w *entry) bool { return !w.peer().greeted || !slices.Contains(r.watchers, w) }
	r.queue = slices.DeleteFunc(r.queue, isFormer)
	stayed := len(r.queue)
	if stayed == 0 {
		r.nextBeat = n.real + n.jitter(heartbeatInterval/2)
	}
	for _, w := range r.watchers {
		if !slices.Contains(r.queue, w) {
			r.queue = append(r.queue, w)
		}
	}

	// All new watchers get their next heartbeat soon. A host may vanish right after it has joined, together with
	// those that were promised an early one; each of them cost half a second more.
	if len(r.queue) > stayed {
		r.early = len(r.queue) - 1
	}
	for place := stayed; place < len(r.queue); place++ {
		r.sendHeartbeat(n, r.queue[place], place)
	}
}

// turn is when the watcher at that place in the queue is sent its next heartbeat.
func (r *heartbeats) turn(place int) time.Duration {
	early := min(place, r.early)
	return r.nextBeat + time.Duration(early)*earlyInterval + time.Duration(place-early)*heartbeatInterval
}

// sendHeartbeat sends a heartbeat to w, whose place in the queue promises it the next one.
func (r *heartbeats) sendHeartbeat(n *node, w *entry, place int) {
	wait := r.turn(place) - n.real
	hdr := n.header(msgHeartbeat)
	hdr.Promise = uint32(max(wait, 0)/ms) + 1 // 0 is no promise
	w.peer().greeted = true
	if w.isValidated() {
		n.send(w.Member, hdr, nil)
		return
	}
	// A watcher that has not answered yet is asked to. Before that it gets no broadcasts, which it does not take
	// if it has not heard of this node.
	n.sendReliable(w.Member, hdr, nil, wait)
	n.noteUnanswered(w)
}

func (r *heartbeats) step(n *node) {
	if len(r.queue) > 0 {
		r.beat(n)
		n.wakeAt(n.now + r.nextBeat - n.real)
	}

	// A broken promise is no verdict: it starts a probe.
	for _, e := range r.watched {
		due := e.peer().due
		if n.now < due {
			n.wakeAt(due)
		} else {
			n.detector.startProbe(n, e.Member)
		}
	}

	if n.now >= r.linkAt {
		r.relink(n)
	}
	n.wakeAt(r.linkAt)
}

// handleHeartbeat takes a heartbeat of e, which promises the next one within so many milliseconds.
func (r *heartbeats) handleHeartbeat(n *node, e *entry, promise uint32) {
	peer := e.peer()
	peer.path.missingBeats = 0
	peer.due = n.now + min(time.Duration(promise)*ms, maxPromise) + n.overdueMargin(e.Member)
	n.detector.handleSignOfLife(n, e.Member)
	if !peer.line.isSettled(n.now) {
		n.pingAtBoundedRate(e)
	}
}

// noteAlive is told that e was found alive, but not by a heartbeat.
func (r *heartbeats) noteAlive(n *node, e *entry) {
	peer := e.peer()
	if peer.due > n.now {
		return // what it promised before holds
	}

	peer.path.missingBeats++
	if peer.path.missingBeats >= tolerableLoss {
		n.warnOfAddress("%s at %s answers, and none of its heartbeats arrive: "+
			"it may not reach this node at %s, which it advertises", e.Name, e.Addr, n.self.Addr)
	}
	// This sign of life promises nothing, so a whole cycle may pass.
	cycle := min(rings, n.table.aliveCount()-1) + 1
	peer.due = n.now + time.Duration(cycle)*heartbeatInterval + n.overdueMargin(e.Member)
}

func (r *heartbeats) beat(n *node) {
	// After a stop each watcher gets one heartbeat, and not all that it has missed.
	missed := time.Duration(len(r.queue)-1) * heartbeatInterval
	r.nextBeat = max(r.nextBeat, n.real-missed)

	for n.real >= r.nextBeat {
		first := r.queue[0]
		r.queue = append(slices.Delete(r.queue, 0, 1), first)
		r.nextBeat = r.turn(1)
		r.early = max(r.early-1, 0)
		r.sendHeartbeat(n, first, len(r.queue)-1)
	}
}

// planLinks plans to ask for other watch links.
func (r *heartbeats) planLinks(n *node) {
	// While many join, rings change all the time, and links follow a little later. But a missing link is made at
	// once, or a kill in between is not noticed before a heartbeat is overdue.
	delay := relinkDelay
	wanted := min(linksWanted, len(r.watchers))
	if len(r.links) < wanted || slices.ContainsFunc(r.links, n.table.ended) {
		delay = 0
	}
	r.linkAt = min(r.linkAt, n.now+delay)
}

// relink asks for watch links to the first watchers that have answered.
func (r *heartbeats) relink(n *node) {
	r.linkAt = never
	r.links = []Member{} // none is a wish, too
	for _, w := range r.watchers {
		if len(r.links) < linksWanted && w.isValidated() {
			r.links = append(r.links, w.Member)
		}
	}
	n.out.links = r.links
}

// ---- probes ----

// detector is all probes that run, and whether this node hears anybody.
type detector struct {
	probes    []*probe
	lastHeard time.Duration // last sign of anybody
	isolated  bool
	retry     bucket
}

// probe is an examination of a member: for a verdict of this node, of which a target has one at a time, or for a
// peer that asked.
type probe struct {
	m            Member        // whom, as it was believed
	e            *entry        // of that name; see isOfRival
	requester    *entry        // the peer that wants this node's result; nil: none
	localOnly    bool          // no other is asked: a helper asks nobody, and of a conflict no peer can tell
	start        time.Duration // of the round
	deciding     bool          // the target is suspect, and this round decides
	seq          uint32        // of the indirect probes: this node's, or what the requester wrote
	roundTrip    time.Duration // to the target, or what the requester says
	stage        int           // of the round: what comes next
	result       verdict       // what this node saw
	stalledSince time.Duration // since when it accepts without answering; 0: it does not
	linkEnded    bool          // a watch link ended: TCP did work, so two refusals mean that nobody is there
	results      map[string]verdict
	pending      []*entry       // helpers that have not answered yet
	claimant     netip.AddrPort // of another agent that wants the target's name
	unanswered   int            // rounds in which no helper has answered
}

// The stages of a round.
const (
	stagePing        = iota
	stageTCP         // with the ping, unless the line is long
	stageHelpers     // a second ping, and the helpers
	stageHelpersLate // those that have not answered
	stageEnd
)

// nextStageAt is when the stage that comes next is due.
func (p *probe) nextStageAt() time.Duration { return p.start + p.schedule()[p.stage] }

// schedule is when each stage falls due, counted from the start of the round. What waits for an answer waits for
// at least two round trips; up to shortLine the fixed times do.
func (p *probe) schedule() [stageEnd + 1]time.Duration {
	twice := 2 * p.roundTrip
	due := [...]time.Duration{0, 0, indirectAfter, indirectAgainAfter, max(probeTimeout, twice)}
	if p.requester != nil {
		due[stageEnd] = max(helperTimeout, twice)
	}
	if p.deciding || p.localOnly {
		return due
	}

	// The helpers' answers take one round trip more than their own probes.
	due[stageHelpers] = max(indirectAfter, twice)
	due[stageHelpersLate] = due[stageHelpers] + max(indirectAgainAfter-indirectAfter, twice)
	due[stageEnd] = due[stageHelpers] + max(probeTimeout-indirectAfter, twice+p.roundTrip)

	isLong := p.roundTrip > shortLine
	seemsDead := p.result == verdictRefused || isLong && p.linkEnded
	if seemsDead {
		due[stageHelpers] = 0 // no time is to be lost
	} else if isLong {
		due[stageTCP] = due[stageHelpers] // a lost heartbeat is to cost a ping and its answer
	}
	return due
}

// noteRoundTrip is told how long the line to the target may be, as somebody else knows it.
func (p *probe) noteRoundTrip(took time.Duration) { p.roundTrip = max(p.roundTrip, took) }

// probesOf is all probes of one instance of a member.
func (d *detector) probesOf(m Member) (ps []*probe) {
	for _, p := range d.probes {
		if p.m.sameInstance(m) {
			ps = append(ps, p)
		}
	}
	return ps
}

// ownProbe is the probe of e for a verdict of this node, or nil.
func (d *detector) ownProbe(e *entry) *probe {
	for _, p := range d.probes {
		if p.e == e && p.requester == nil {
			return p
		}
	}
	return nil
}

// rivalProbe is the probe of another agent of this node's name, or nil.
func (d *detector) rivalProbe(n *node) *probe { return d.ownProbe(n.self) }

// isOfRival reports whether another agent of this node's name is examined. It has no entry: this node has it.
func (p *probe) isOfRival(n *node) bool { return p.e == n.self }

func (d *detector) addProbe(n *node, m Member) *probe {
	n.logf(levelTrace, "probing %s at %s", m.Name, m.Addr)
	p := &probe{
		m:         m,
		e:         n.table.get(m.Name),
		localOnly: m.Name == n.self.Name,
		start:     n.now,
		seq:       n.nonce(),
		roundTrip: n.roundTripTo(m),
		results:   make(map[string]verdict),
	}
	d.probes = append(d.probes, p)
	return p
}

func (d *detector) remove(p *probe) {
	d.probes = slices.DeleteFunc(d.probes, func(o *probe) bool { return o == p })
}

// startProbe probes m for a verdict of this node. Where there are too many probes it has to wait: nil.
func (d *detector) startProbe(n *node, m Member) *probe {
	p := d.ownProbe(n.table.get(m.Name))
	if p == nil && len(d.probes) < maxProbes {
		p = d.addProbe(n, m)
	}
	return p
}

// probeHolder probes m because another agent, at the address rival, wants its name.
func (d *detector) probeHolder(n *node, m Member, rival netip.AddrPort) {
	p := d.startProbe(n, m)
	if p != nil {
		p.claimant = rival
	}
}

// linkEnded is told that a watch link with an instance of m has ended (tries 0), or that for the tries-th time in
// a row none could be made.
func (d *detector) linkEnded(n *node, m Member, tries int) {
	e := n.table.get(m.Name)
	if n.table.ended(m) || e == n.self || e.failedLocally() {
		return
	}
	if tries > linkTries { // a firewall stays, and says nothing about the member
		return
	}
	if tries == linkTries {
		n.logf(levelWarn, "no TCP connection to %s at %s lasts: is TCP blocked between it and %s?",
			m.Name, m.Addr, n.self.Addr)
	}

	// This is evidence, never a verdict.
	p := d.startProbe(n, e.Member)
	if p != nil {
		p.linkEnded = p.linkEnded || tries == 0
	}
}

func (d *detector) step(n *node) {
	for _, p := range slices.Clone(d.probes) {
		d.stepProbe(n, p)
	}
	d.stepIsolation(n)
	d.stepRetry(n)
	d.stepDamped(n)
}

func (d *detector) stepProbe(n *node, p *probe) {
	if p.isObsolete(n) {
		d.remove(p)
		return
	}
	if p.isSettled() {
		d.conclude(n, p)
		return
	}

	for n.now >= p.nextStageAt() {
		switch p.stage {
		case stagePing:
			p.pending = d.chooseHelpers(n, p)
			n.ping(p.m)
		case stageTCP:
			n.tcpProbe(p.m)
		case stageHelpers:
			n.ping(p.m)
			d.askHelpers(n, p)
		case stageHelpersLate:
			if p.deciding { // the last chance to contradict: one answer must get through
				n.ping(p.m)
			}
			d.askHelpers(n, p)
		case stageEnd:
			d.conclude(n, p)
			return
		}
		p.stage++
	}
	n.wakeAt(p.nextStageAt())
}

// isObsolete reports whether there is nothing left to find out: that instance is over, it cannot be judged from
// here, or the suspect has refuted.
func (p *probe) isObsolete(n *node) bool {
	if p.isOfRival(n) {
		return false
	}
	isOver := p.e.Instance != p.m.Instance || p.e.Status.isDead() || p.e.local.isolated
	refuted := p.e.Status != statusSuspect || p.e.Incarnation != p.m.Incarnation
	return isOver || p.deciding && refuted
}

// isSettled reports whether the rest of the round cannot change the verdict.
func (p *probe) isSettled() bool {
	if p.localOnly {
		return p.result == verdictAlive || p.result == verdictRefused
	}
	// After a watch link has ended it is no firewall that refuses: TCP did work.
	contradicted := p.countOf(verdictSilent)+p.countOf(verdictAlive) > 0
	return p.linkEnded && p.countOf(verdictRefused) >= 2 && !contradicted
}

// chooseHelpers are the target's other watchers and one random member.
func (d *detector) chooseHelpers(n *node, p *probe) (helpers []*entry) {
	if p.localOnly {
		return nil
	}
	if p.unanswered == 0 {
		helpers = slices.DeleteFunc(n.table.watchers(p.e), func(w *entry) bool { return w == n.self })
	}
	canHelp := func(e *entry) bool { return !e.isSkipped() && e != p.e && !slices.Contains(helpers, e) }
	hasAnswered := func(e *entry) bool { return e.isValidated() && canHelp(e) }

	// Where most hosts are lost at once, the watchers are as dead as the target. After a round without a result
	// only random members are asked, each time more of them. Those that have ever answered this node come first,
	// since what others are sent is limited.
	for range 1 << (2 * min(p.unanswered, 2)) { // 1, 4, 16
		helper := n.randomMember(n.table.ring[0], hasAnswered)
		if helper == nil {
			helper = n.randomMember(n.table.ring[0], canHelp)
		}
		if helper == nil {
			break
		}
		helpers = append(helpers, helper)
	}
	return helpers
}

// askHelpers asks the helpers that have not answered in this round.
func (d *detector) askHelpers(n *node, p *probe) {
	hdr := n.header(msgIndirectProbe)
	hdr.Seq = p.seq
	hdr.Target = p.m.Name
	if p.roundTrip > shortLine {
		hdr.Promise = uint32(p.roundTrip / ms)
	}
	for _, w := range p.pending {
		n.send(w.Member, hdr, nil)
	}
}

// randomMember picks one of the others in list for which ok holds, or nil; the list holds this node, too. One that
// follows a row of members that do not count is picked more often: on a ring, it is the one that had to watch that
// row.
func (n *node) randomMember(list []*entry, ok func(*entry) bool) *entry {
	start := n.rng.IntN(len(list))
	for i := range list {
		e := list[(start+i)%len(list)]
		if e != n.self && ok(e) {
			return e
		}
	}
	return nil
}

// handleIndirectProbe answers the request of by: at once where the answer is known, otherwise within
// helperTimeout, or two round trips. Only members are probed, at the address that this node knows.
func (d *detector) handleIndirectProbe(n *node, by *entry, hdr header) {
	e := n.table.get(hdr.Target)
	if e == nil || e == n.self || by.Status.isDead() {
		return
	}
	asked := 0
	for _, p := range d.probes {
		if p.requester != by {
			continue
		}
		if p.seq == hdr.Seq { // asked again
			return
		}
		asked++
	}
	if e.Status.isDead() { // the requester has missed it, and may have nobody else to ask
		d.sendProbeResult(n, &probe{m: e.Member, requester: by, seq: hdr.Seq})
		return
	}
	// This node needs the other half for probes of its own.
	if len(d.probes) >= maxProbes/2 || asked >= maxProbesForPeer {
		return
	}

	running := d.probesOf(e.Member)
	p := d.addProbe(n, e.Member)
	p.requester = by
	p.localOnly = true
	p.seq = hdr.Seq
	// The line from here may not be known, and may be as long.
	p.noteRoundTrip(min(time.Duration(hdr.Promise)*ms, longestLine))
	// One probe serves all, unless it was answered: the target may have died since.
	if len(running) > 0 && running[0].stage > stageTCP && running[0].result != verdictAlive {
		p.stage = stageEnd
		p.record(running[0].result)
	}
}

func (d *detector) sendProbeResult(n *node, p *probe) {
	hdr := n.header(msgProbeResult)
	hdr.Seq = p.seq
	hdr.Target = p.m.Name
	hdr.Verdict = max(p.result, verdictUnreachable)
	// It says of which instance: a helper that knows a newer one would otherwise clear the old one for ever.
	n.send(p.requester.Member, hdr, wire.encode(nil, &update{Member: p.m}))
}

// handleProbeResult takes a helper's answer, if it is one to a probe that still runs.
func (d *detector) handleProbeResult(n *node, by *entry, hdr header, us []update) {
	p := d.ownProbe(n.table.get(hdr.Target))
	if p == nil || p.seq != hdr.Seq || len(us) != 1 {
		return
	}
	target := us[0].Member
	if target.Name != hdr.Target || by == p.e || by.Status.isDead() {
		return
	}

	if target.Instance == p.m.Instance {
		p.recordFrom(by.Name, min(hdr.Verdict, verdictAlive))
	} else if !target.Status.isDead() { // news of another instance
		n.handleUpdate(&us[0], by.Name, nil)
	}
}

// recordFrom notes the result of another observer.
func (p *probe) recordFrom(by string, v verdict) {
	p.results[by] = v
	p.pending = slices.DeleteFunc(p.pending, func(w *entry) bool { return w.Name == by })
}

// countOf counts the observers that saw v, this node included.
func (p *probe) countOf(v verdict) (count int) {
	if p.result == v {
		count++
	}
	for _, result := range p.results {
		if result == v {
			count++
		}
	}
	return count
}

// ---- verdicts ----

// heardFrom is told that somebody was heard from just now: this node is not cut off.
func (d *detector) heardFrom(now time.Duration) { d.lastHeard = now }

// handleTCPProbeResult takes what a TCP probe of m has seen: first perhaps that the kernel accepts
// (verdictSilent), then verdictRefused, that it hung up (verdictNone), or verdictAlive and welcome, the handshake
// reply of what is there.
func (d *detector) handleTCPProbeResult(n *node, m Member, v verdict, welcome header) {
	if m.Addr != n.self.Addr { // what this machine says of its own port proves nothing
		d.heardFrom(n.now)
	}
	isName := welcome.From == m.Name
	isTarget := isName && welcome.instance() == m.Instance
	if v == verdictAlive && !isTarget {
		v = verdictRefused // another process lives at its address
	}

	e := n.table.get(m.Name)
	if e != nil && e != n.self && e.Instance == m.Instance {
		if v == verdictAlive {
			n.noteValidated(e)
		} else if welcome.From != "" && !isName {
			e.peer().path.occupant = welcome.From
		}
	}
	for _, p := range d.probesOf(m) {
		p.record(v)
	}
}

// handleSignOfLife is told that m was heard of by UDP just now.
func (d *detector) handleSignOfLife(n *node, m Member) {
	for _, p := range d.probesOf(m) {
		if p.localOnly {
			p.record(verdictAlive)
		} else {
			d.clear(n, p)
		}
	}
}

// record notes what this node saw itself. What accepts in silence has not stalled if it hangs up then, or has
// gone.
func (p *probe) record(v verdict) {
	if v > p.result || p.result == verdictSilent {
		p.result = v
	}
}

// conclude gives the verdict at the end of a round.
func (d *detector) conclude(n *node, p *probe) {
	silent := p.countOf(verdictSilent) > 0
	stalled := silent && (p.stalledSince == 0 || n.now < p.stalledSince+stallTimeout)
	switch {
	case p.requester != nil:
		d.remove(p)
		d.sendProbeResult(n, p)
	case p.isOfRival(n) && !stalled: // a name is not lost by a moment of silence
		d.remove(p)
		n.identity.conflictResolved(n, p.m, p.result == verdictAlive)
	case p.result == verdictAlive: // by TCP alone, or a heartbeat would have cleared it
		d.noteOnlyTCP(n, p)
		d.clear(n, p)
	case p.countOf(verdictAlive) > 0: // only this node does not reach it
		n.table.release(n.now, p.e)
		d.clear(n, p)
	case stalled:
		d.handleStall(n, p)
	case silent, p.result == verdictRefused, p.countOf(verdictRefused) >= 2:
		d.declareFailed(n, p)
	default:
		d.concludeUnreachable(n, p)
	}
}

// concludeUnreachable gives the verdict where nothing at all has come back.
func (d *detector) concludeUnreachable(n *node, p *probe) {
	onlyTwo := n.table.aliveCount() <= 2 // there is nobody else to ask, or to hear
	hearsNobody := n.now-d.lastHeard > probeTimeout
	switch {
	case p.deciding && hearsNobody && !onlyTwo:
		d.restart(n, p, n.now+indirectAfter) // it may be this node
	case p.deciding:
		d.declareFailed(n, p)
	case onlyTwo || len(p.results) > 0: // no other observer reaches it either
		d.declareSuspect(n, p)
	default: // no helper has answered
		p.unanswered++
		d.restart(n, p, n.now)
	}
}

// noteOnlyTCP is told that the target has answered TCP alone in this round.
func (d *detector) noteOnlyTCP(n *node, p *probe) {
	peer := p.e.peer()
	peer.tcpOnly++
	if peer.tcpOnly == 2 { // once may be mere loss
		n.logf(levelWarn, "%s at %s answers TCP but not UDP: is UDP blocked between it and %s?",
			p.m.Name, p.m.Addr, n.self.Addr)
	}
	n.sync(p.e.Member) // no broadcast reaches it
}

func (d *detector) restart(n *node, p *probe, start time.Duration) {
	n.wakeAt(start)
	p.start = start
	p.stage = stagePing
	p.result = verdictNone
	p.linkEnded = false
	p.roundTrip = n.roundTripTo(p.m)
	clear(p.results) // what comes late counts in the next round
}

// clear ends a probe of a member that somebody reached.
func (d *detector) clear(n *node, p *probe) {
	d.remove(p)
	if p.claimant.IsValid() {
		n.identity.warnOfConflict(n, p.e.Member, p.claimant)
	}
	n.heartbeats.noteAlive(n, p.e)
}

// handleStall waits for a member whose kernel accepts while the process is silent: every busy machine stalls for
// some seconds, and is not dead.
func (d *detector) handleStall(n *node, p *probe) {
	if p.stalledSince == 0 {
		n.logf(levelDebug, "%s at %s is stalled: it accepts connections and does not answer", p.m.Name, p.m.Addr)
		p.stalledSince = p.start
	}
	// Each round dials anew: a host that vanishes right after it accepted would otherwise count as stalled.
	concludeAt := min(n.now+stallRound, p.stalledSince+stallTimeout)
	d.restart(n, p, max(n.now, concludeAt-p.schedule()[stageEnd]))
}

// declareSuspect tells everybody that the target is unreachable, and gives it time to contradict.
func (d *detector) declareSuspect(n *node, p *probe) {
	n.logf(levelDebug, "%s at %s is suspect: nothing at all comes back", p.m.Name, p.m.Addr)

	// The suspicion ends with another round. What this one took longer than on a short line is saved before it: up
	// to 300 ms of round trip, a lost host has failed as soon.
	saved := p.schedule()[stageEnd] - probeTimeout
	wait := suspicionTimeout - saved - max(probeTimeout, 2*p.roundTrip)

	p.m = p.e.Member // with all that was said of it meanwhile
	p.deciding = true
	n.applyAndBroadcast(p.m.with(statusSuspect))
	n.sendClaim(p.m, n.claim(p.e)) // a suspect that hears of it refutes, and no broadcast may reach it
	d.restart(n, p, n.now+max(wait, 0))
}

// declareFailed is the verdict: the target has failed, and everybody is told.
func (d *detector) declareFailed(n *node, p *probe) {
	d.remove(p)
	n.applyAndBroadcast(p.e.with(statusFailed))
}

// ---- isolation ----

// stepIsolation decides whether this node is the one that is cut off. By then the probes of those that it watches
// have asked many others, of which any that answers would have shown that it is not.
func (d *detector) stepIsolation(n *node) {
	isolatedAt := d.lastHeard + isolatedAfter + max(isolatedMargin, 2*n.longestRoundTrip())
	if n.now < isolatedAt {
		n.wakeAt(isolatedAt)
		return
	}

	seemsAlive := func(e *entry) bool { return e != n.self && !e.failedLocally() }
	if !slices.ContainsFunc(n.table.ring[0], seemsAlive) {
		return
	}

	// What this node believes of the others from now on stays here, and is told to nobody.
	d.isolated = true
	n.logf(levelWarn, "no member answers: this node seems to be cut off, it goes on trying")
	for _, e := range n.table.ordered {
		if e != n.self && !e.Status.isDead() {
			n.table.setIsolated(n.now, e, true)
		}
	}
}

// noteAnswered is told that e answered something just now, wherever: this node is not cut off.
func (d *detector) noteAnswered(n *node, e *entry) {
	if d.isolated {
		d.isolated = false
		n.logf(levelInfo, "%s answers again", e.Name)
	}
}

// stepRetry pings the failed members, so that a split heals by itself.
func (d *detector) stepRetry(n *node) {
	// Each node takes its share, so a failed member gets as many pings in a cluster of any size.
	rate := retryRate * float64(n.table.failed) / float64(n.table.total)
	isDue := d.retry.take(n.now, 1, rate, 2)
	if isDue {
		isFailed := func(e *entry) bool { return e.displayStatus() == statusFailed }
		if e := n.randomMember(n.table.ordered, isFailed); e != nil {
			n.ping(e.Member)
		}
	}
	if rate > 0 {
		wait := time.Duration((1 - d.retry.tokens) / rate * float64(time.Second))
		n.wakeAt(n.now + max(wait, ms))
	}
}

// stepDamped asks the members that are damped for an answer of their own: at once, and then, with the help of others,
// ever more rarely.
func (d *detector) stepDamped(n *node) {
	for _, e := range n.table.damped {
		flap := &e.peer().flap
		if flap.dampedUntil == 0 { // it is damped from now on
			flap.dampedUntil = n.now + flapWait(flap.count)
			hdr := n.header(msgPing)
			hdr.Target = e.Name
			n.sendReliable(e.Member, hdr, nil, requestTimeout)
			n.warnOfSilence(e)
		} else if n.now >= flap.dampedUntil {
			flap.count++
			flap.dampedUntil = n.now + flapWait(flap.count)
			d.startProbe(n, e.Member)
		}
		n.wakeAt(flap.dampedUntil)
	}
}

// ---- queries ----

// queries are those of this node that wait for answers. A query is sent reliably to each member that is asked, and
// so is each answer, to the asker alone: no member gets a query twice or late.
type queries struct {
	open []*query
}

// query is one that this node has asked.
type query struct {
	id      uint32
	until   time.Duration
	waiting []Member // whose answer has not come
}

// ask asks the living members that nodes names; none: all of them. It returns the query's number, which the events
// of its answers bear, and the names of those that were asked. The last of those events has replyNone.
func (qs *queries) ask(n *node, name string, payload []byte, nodes []string, within time.Duration) (
	id uint32, names []string, err error) {

	if err := validatePayload("query", name, payload); err != nil {
		return 0, nil, err
	}
	if within <= 0 || within > maxQueryTimeout {
		return 0, nil, fmt.Errorf("a query can wait for at most %v, not %v", maxQueryTimeout, within)
	}
	if len(qs.open) >= maxQueries || len(n.requests.open) >= maxRequests/2 {
		return 0, nil, fmt.Errorf("too many queries of this agent are under way: %d", len(qs.open))
	}

	q := &query{id: n.nonce(), until: n.now + within}
	u := update{
		Member:  Member{Name: n.self.Name},
		Name:    name,
		Payload: payload,
		LTime:   min(n.broadcasts.events.lamport+1, maxCount),
		Timeout: uint32(within / ms),
	}
	hdr := n.header(msgQuery)
	hdr.Query = q.id
	body := wire.encode(nil, &u)
	slices.Sort(nodes)
	for _, e := range n.table.ordered {
		_, isNamed := slices.BinarySearch(nodes, e.Name)
		wanted := isNamed || len(nodes) == 0
		if !wanted || e.displayStatus() != statusAlive {
			continue
		}
		q.waiting = append(q.waiting, e.Member)
		names = append(names, e.Name)
		if e != n.self {
			n.sendReliable(e.Member, hdr, body, within)
		}
	}
	if len(names) == 0 {
		return 0, nil, errNobodyAsked
	}

	qs.open = append(qs.open, q)
	if slices.Contains(names, n.self.Name) {
		qs.handleAnswer(n, n.self, header{Query: q.id, Reply: replyAck}, nil)
		err = qs.handleQuery(n, n.self, hdr, []update{u})
	}
	return q.id, names, err
}

func (qs *queries) handleQuery(n *node, e *entry, hdr header, us []update) error {
	if len(us) != 1 || !isValidEvent(&us[0]) {
		return errors.New("sent a bad query")
	}
	u := us[0]

	// It may arrive again: it is sent until it is acknowledged.
	peer := e.peer()
	if slices.Contains(peer.seenQueries, hdr.Query) {
		return nil
	}
	peer.seenQueries = appendBounded(peer.seenQueries, maxHeardOfPeer, hdr.Query)

	n.broadcasts.events.witness(u.LTime)
	ev := Event{kind: eventQuery, update: u, id: hdr.Query}
	ev.Member = e.Member
	ev.Coalesce = false // whatever the peer says: a query takes the place of no other in a queue
	n.out.events = append(n.out.events, ev)
	return nil
}

// sendReply is told what came of ev, an eventQuery.
func (qs *queries) sendReply(n *node, ev Event, r reply, text []byte) {
	e := n.table.get(ev.Member.Name)
	if e == nil || e.Instance != ev.Member.Instance {
		return
	}
	hdr := n.header(msgReply)
	hdr.Query = ev.id
	hdr.Reply = r
	u := update{Payload: text}
	if e == n.self {
		qs.handleAnswer(n, e, hdr, []update{u})
		return
	}
	within := min(time.Duration(ev.Timeout)*ms, replyTimeout)
	n.sendReliable(e.Member, hdr, wire.encode(nil, &u), within)
}

// handleAnswer takes what e says of a query of this node.
func (qs *queries) handleAnswer(n *node, e *entry, hdr header, us []update) {
	if hdr.Reply == replyNone || hdr.Reply > replyFailed {
		return
	}
	i := slices.IndexFunc(qs.open, func(q *query) bool { return q.id == hdr.Query })
	if i < 0 || !slices.ContainsFunc(qs.open[i].waiting, e.sameInstance) {
		return
	}

	if hdr.Reply != replyAck {
		qs.open[i].waiting = slices.DeleteFunc(qs.open[i].waiting, e.sameInstance)
	}
	ev := Event{kind: eventAnswer, update: update{Member: e.Member}, id: hdr.Query, reply: hdr.Reply}
	for _, u := range us {
		ev.Payload = u.Payload[:min(len(u.Payload), maxPayload)]
	}
	n.out.events = append(n.out.events, ev)
}

// step ends queries: when all that live have answered, or their time is over.
func (qs *queries) step(n *node) {
	var open []*query
	for _, q := range qs.open {
		q.waiting = slices.DeleteFunc(q.waiting, n.table.ended)
		if len(q.waiting) == 0 || n.now >= q.until {
			n.out.events = append(n.out.events, Event{kind: eventAnswer, id: q.id})
			continue
		}
		open = append(open, q)
		n.wakeAt(q.until)
	}
	qs.open = open
}

// ---- commands ----

// forceLeave makes everybody believe that a failed member has left; with prune it also vanishes.
func (n *node) forceLeave(name string, prune bool) error {
	e := n.table.get(name)
	switch {
	case e == nil || e.displayStatus() == 0:
		return fmt.Errorf("no member is called %q", name)
	case e.displayStatus() == statusAlive:
		return fmt.Errorf("member %q is alive: only a failed one can be made to leave", name)
	case !e.Status.isDead():
		return fmt.Errorf("this node is cut off and cannot judge %q", name)
	}

	status := statusLeft
	if prune {
		status = statusPruned
	}
	n.applyAndBroadcast(e.with(status))
	return nil
}

// members copies what users see of those whose names follow after, sorted by name: limit of them at most.
func (n *node) members(after string, limit int) (ms []Member) {
	first, _ := n.table.index(after + "\x00") // the least name that is greater
	for _, e := range n.table.ordered[first:] {
		if len(ms) >= limit {
			break
		}
		status := e.displayStatus()
		if e == n.self && n.identity.leaving != 0 {
			status = statusLeaving
		}
		if status != 0 {
			ms = append(ms, e.with(status))
		}
	}
	return ms
}

// info is what this node knows of itself: group, key, value; and so on.
func (n *node) info() (facts []string) {
	add := func(key string, value any) { facts = append(facts, "serf", key, fmt.Sprint(value)) }
	members := n.members("", maxMembers)
	count := make(map[Status]int)
	for _, m := range members {
		count[m.Status]++
	}

	add("cut_off", n.detector.isolated)
	add("event_time", n.broadcasts.events.lamport)
	add("failed", count[statusFailed])
	add("left", count[statusLeft])
	add("members", len(members))
	add("seeds", strings.Join(n.cfg.seeds, ","))
	add("seeds_error", n.joining.errors(math.MaxInt))
	return facts
}

// ---- the loop ----
//
// Below this line is what the pure core knows nothing of: one goroutine, which owns the node and never blocks, and
// UDP.

// gossipConfig is what newGossip needs to know. The member's address is what others are told: none means the
// bound one, its port 0 the bound port.
type gossipConfig struct {
	nodeConfig
	sealer
	bind  netip.AddrPort // UDP and TCP; port 0 takes a free one
	moves bool           // the address was not chosen by the user: it may change
	iface string         // it is one of this interface; "": of any
	// awaits is why the address to advertise is not known yet, "": it is. Until addressKnown no member is joined
	// or let in.
	awaits string
	log    logger
	// events is called from the loop with each event, and with what takes a query's answer: it must not block.
	events func(ev Event, answer func(r reply, text []byte))
}

// gossip runs a node: it owns its sockets and the loop. Its methods are safe for concurrent use.
type gossip struct {
	cfg      gossipConfig
	acceptor acceptor // at the TCP port, with the seal of both, and all else that is under way
	udp      *net.UDPConn
	start    time.Time
	record   atomic.Pointer[claim] // the own record, and whether this node is cut off, at the last tick
	isolated atomic.Bool
	inputs   chan func(*node) // what the loop is to do
	lines    *logLimit        // that others can cause
	feed     feed             // for commands that read events
	turns    chan struct{}    // of sessions that have the loop make or take a chunk of a table
	ready    chan struct{}    // closed: the address to advertise is known
	ended    chan struct{}    // the loop; done: also all that it has started
	done     chan struct{}    // all has ended: err and last may be read
	state    loopState

	err  error   // why the loop has ended; nil: it was told to
	last []Event // what handlers are still to be given then
}

// loopState is what the loop alone touches.
type loopState struct {
	node  *node
	links map[string]context.CancelFunc
}

// What others can cause lines about. Each has its own bound, so that any number of lines about what anybody can forge
// hides no line of more importance.
const (
	aboutHost      = "this host"                   // it has too little of something
	aboutPeers     = "peers that were refused"     // at an address that answers
	aboutStrangers = "datagrams that were refused" // anybody can forge where they come from
	aboutMembers   = "members"
	aboutEvents    = "user events"
	aboutQueries   = "queries"
)

const (
	logRate       = 50          // lines a second about each
	logBurst      = 2000        // and at once
	maxSources    = 10          // that are named, of what was refused
	sourceSilence = time.Minute // for which one of them is not named again
)

// logLimit bounds the log lines that others can cause. Safe for concurrent use.
type logLimit struct {
	log    logger
	start  time.Time
	mu     sync.Mutex
	topics map[string]*logTopic // by what the lines are about
}

type logTopic struct {
	room    bucket
	omitted int                      // lines, since the last one that was logged
	named   map[string]time.Duration // when each source was last named
}

func newLogLimit(log logger) *logLimit {
	return &logLimit{log: log, start: time.Now(), topics: make(map[string]*logTopic)}
}

// printf logs a line about source, if the topic has room for it and the source was not named for a while. Source ""
// is that of lines which may follow each other.
func (l *logLimit) printf(about, source string, level logLevel, format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.topics[about]
	if t == nil {
		t = &logTopic{named: make(map[string]time.Duration)}
		l.topics[about] = t
	}

	now := time.Since(l.start)
	maps.DeleteFunc(t.named, func(_ string, at time.Duration) bool { return now-at >= sourceSilence })
	_, wasNamed := t.named[source]
	mayLog := !wasNamed && len(t.named) < maxSources
	if mayLog {
		mayLog = t.room.take(now, 1, logRate, logBurst)
	}
	if !mayLog {
		t.omitted++
		return
	}

	if t.omitted > 0 {
		l.log.printf(levelWarn, "lines about %s were left out: %d", about, t.omitted)
		t.omitted = 0
	}
	if source != "" {
		t.named[source] = now
	}
	l.log.printf(level, format, a...)
}

// newGossip binds the sockets. The loop is still to be started: it begins to join the seeds.
func newGossip(cfg gossipConfig) (*gossip, error) {
	g := &gossip{
		cfg:    cfg,
		start:  time.Now(),
		inputs: make(chan func(*node), maxInputs),
		turns:  make(chan struct{}, maxMerging),
		ready:  make(chan struct{}),
		ended:  make(chan struct{}),
		done:   make(chan struct{}),
		lines:  newLogLimit(cfg.log),
	}
	g.acceptor = acceptor{places: newPlaces(), lines: g.lines, serve: g.serve}
	g.cfg.portKind = gossipPort
	g.acceptor.sealer.Store(&g.cfg.sealer)
	if err := g.listen(); err != nil {
		return nil, err
	}

	bound := g.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	self := &cfg.member
	self.Addr = advertisedAddr(self.Addr, bound)
	self.Instance = newInstanceID(uint64(g.start.UnixMilli()), rand.Uint64())
	self.Incarnation = self.Instance
	crand.Read(cfg.random[:])
	g.state = loopState{node: newNode(cfg.nodeConfig, 0), links: make(map[string]context.CancelFunc)}
	g.record.Store(g.state.node.self.claim)
	if cfg.awaits == "" {
		close(g.ready)
	}

	g.acceptor.ctx, g.acceptor.quit = context.WithCancel(context.Background())
	g.acceptor.wg.Go(g.readUDP)
	g.acceptor.wg.Go(g.acceptor.accept)
	return g, nil
}

// advertisedAddr is what the user chose; what is not chosen is as bound.
func advertisedAddr(chosen, bound netip.AddrPort) netip.AddrPort {
	ip := chosen.Addr()
	if !ip.IsValid() {
		ip = bound.Addr().Unmap()
	}
	port := chosen.Port()
	if port == 0 {
		port = bound.Port()
	}
	return netip.AddrPortFrom(ip, port)
}

// listen binds UDP and TCP to one port.
func (g *gossip) listen() error {
	bind := g.cfg.bind
	config := net.ListenConfig{KeepAlive: -1}
	for tries := 1; ; tries++ {
		tcp, err := config.Listen(context.Background(), "tcp"+family(bind.Addr()), bind.String())
		if err != nil {
			return err
		}
		port := uint16(tcp.Addr().(*net.TCPAddr).Port)
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(bind.Addr(), port))
		udp, err := net.ListenUDP("udp"+family(bind.Addr()), at)
		if err == nil {
			g.acceptor.tcp = tcp
			g.udp = udp
			return udp.SetReadBuffer(1 << 20)
		}

		// Another process has taken the free port between the two: another one may do.
		tcp.Close()
		if bind.Port() != 0 || tries == 10 {
			return err
		}
	}
}

// loop is the loop: the only goroutine that touches the node.
func (g *gossip) loop() {
	var planned time.Duration
	for g.acceptor.ctx.Err() == nil {
		select {
		case input := <-g.inputs:
			g.state.node.step(time.Since(g.start), input)
		case <-time.After(max(planned-time.Since(g.start), 0)):
		case <-g.acceptor.ctx.Done():
		}
		// A process that was stopped must hear what has arrived meanwhile before it judges, so the readers get a
		// moment to hand it over.
		if time.Since(g.start)-planned > lateBy {
			time.Sleep(2 * ms)
		}
		g.drain()

		out := g.state.node.tick(time.Since(g.start))
		g.perform(out)
		planned = out.wake
	}

	close(g.ended)
	g.udp.Close()
	g.acceptor.close()
	close(g.done)
}

// drain takes the inputs that wait. Peers that never stop sending must not keep the node from ticking.
func (g *gossip) drain() {
	end := time.Since(g.start) + drainFor
	for len(g.inputs) > 0 && time.Since(g.start) < end {
		input := <-g.inputs
		g.state.node.step(time.Since(g.start), input)
	}
}

// perform does what the node wants done.
func (g *gossip) perform(out outputs) {
	g.record.Store(g.state.node.self.claim)
	g.isolated.Store(g.state.node.detector.isolated)
	for _, l := range out.logs {
		g.cfg.log(l)
	}
	for _, ev := range out.events {
		g.dispatch(ev)
	}
	if len(out.packets) > 0 {
		g.sendPackets(out.packets)
	}

	for _, m := range out.tcpProbes {
		roundTrip := g.state.node.roundTripTo(m)
		g.acceptor.wg.Go(func() { g.tcpProbe(m, roundTrip) })
	}
	for _, m := range out.syncs { // one that fails is wanted again
		sync := &stateSync{peer: Member{Addr: m.Addr}, roundTrip: g.state.node.roundTripTo(m)}
		g.acceptor.wg.Go(func() { g.syncWith(sync) })
	}
	if out.links != nil {
		g.relink(g.state.node.self.Member, out.links)
	}
	for _, i := range out.seeds {
		g.acceptor.wg.Go(func() {
			r := g.joinSeed(g.cfg.seeds[i], stateSync{joins: true})
			g.post(func(n *node) { n.joining.handleSeedTried(n, i, r) })
		})
	}

	if out.left {
		self := g.state.node.self.with(statusLeft)
		g.last = []Event{{kind: eventLeave, update: update{Member: self}}} // for handlers that deregister it
	}
	if out.left || out.fatal != nil {
		g.err = out.fatal
		g.acceptor.quit()
	}
}

func (g *gossip) sendPackets(packets []packet) {
	// At a deadline of 1 ms, a process that had to wait for its processor lost whole batches.
	g.udp.SetWriteDeadline(time.Now().Add(writeFor))
	sealer := g.acceptor.sealer.Load()
	for _, p := range packets {
		g.udp.WriteToUDPAddrPort(sealer.sealDatagram(p.data, p.to), p.to.Addr)
	}
	g.udp.SetWriteDeadline(time.Time{}) // or its timer would wake the process
}

// dispatch hands an event to the commands that read events, to the log and to the handlers.
func (g *gossip) dispatch(ev Event) {
	g.feed.publish(ev)
	if ev.kind == eventAnswer {
		return
	}
	g.logEvent(ev)
	g.cfg.events(ev, func(r reply, text []byte) {
		g.post(func(n *node) { n.queries.sendReply(n, ev, r, text) })
	})
}

func (g *gossip) logEvent(ev Event) {
	m := ev.Member
	switch ev.kind {
	case eventUser:
		g.lines.printf(aboutEvents, "", levelInfo, "user-event: %s (from %s, %d bytes)",
			oneLine(ev.Name), m.Name, len(ev.Payload))
	case eventQuery:
		g.lines.printf(aboutQueries, "", levelDebug, "query: %s (from %s, %d bytes)",
			oneLine(ev.Name), m.Name, len(ev.Payload))
	case eventFailed:
		g.lines.printf(aboutMembers, "", levelWarn, "%s: %s %s", ev.kind, m.Name, m.Addr)
	case eventUpdate:
		g.lines.printf(aboutMembers, "", levelInfo, "%s: %s %s (%s)", ev.kind, m.Name, m.Addr, oneLine(ev.changed))
	default:
		g.lines.printf(aboutMembers, "", levelInfo, "%s: %s %s", ev.kind, m.Name, m.Addr)
	}
}

// readUDP hands the datagrams that are for this node to the loop.
func (g *gossip) readUDP() {
	buf := make([]byte, maxDatagram+1)
	dropped := 0
	for {
		size, source, err := g.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP answer to something sent before
		}

		from := netip.AddrPortFrom(source.Addr().Unmap(), source.Port())
		self := g.record.Load().Member
		opened, anyInstance, err := g.acceptor.sealer.Load().openDatagram(buf[:size], self)
		if errors.Is(err, errNotForMe) {
			continue
		}
		if err != nil {
			g.lines.logRejected(aboutStrangers, from.Addr(), err)
			continue
		}

		data := slices.Clone(opened)
		input := func(n *node) {
			err := n.handleDatagram(from, data, anyInstance)
			g.lines.logRejected(aboutStrangers, from.Addr(), err)
		}
		select {
		case g.inputs <- input:
		default: // the reader of a socket must not wait
			dropped++
			g.lines.printf(aboutHost, "datagrams", levelWarn,
				"datagrams are dropped, %d so far: more come in than this host has time for", dropped)
		}
	}
}

// post has the loop run f, unless it has ended.
func (g *gossip) post(f func(*node)) {
	select {
	case g.inputs <- f:
	case <-g.ended:
	}
}

// run runs f in the loop and waits for it.
func (g *gossip) run(f func(*node) error) error {
	ran := make(chan error, 1)
	g.post(func(n *node) { ran <- f(n) })
	select {
	case err := <-ran:
		return err
	case <-g.ended:
		return errStopped
	}
}

// self returns this node's own record, whose Addr is the advertised one, and whether it is cut off.
func (g *gossip) self() (m Member, isolated bool) { return g.record.Load().Member, g.isolated.Load() }

// setKeys has all that is sent from now on sealed with the first of keys, and opens what any of them has sealed.
func (g *gossip) setKeys(keys [][]byte) {
	next := *g.acceptor.sealer.Load()
	next.keys = keys
	g.acceptor.sealer.Store(&next)
}

// leave tells everybody that this node leaves, waits at most a second for that, and stops the loop.
func (g *gossip) leave() error {
	err := g.run(func(n *node) error {
		n.identity.startLeave(n)
		return nil
	})
	<-g.done
	return err
}

// close stops the loop at once, without leaving.
func (g *gossip) close() {
	g.acceptor.quit()
	<-g.done
}
