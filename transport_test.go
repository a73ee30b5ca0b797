package main

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A change of these bytes is a change of the protocol: old and new agents
// would not understand each other, and protocolVersion must go up.
func TestTheBytesOfAHeartbeatArePinned(t *testing.T) {
	c := newCodec()
	b := c.head(nil, &head{Kind: kHeartbeat, From: "web1", Incarnation: 1386489408000, Digest: 0x1122334455667788, Promise: 2000, Seq: 7})
	const want = "23ff80010101047765623101fa0142d1356a00" + "02f8112233445566778801fe07d0010700"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("heartbeat is\n%s, want\n%s", got, want)
	}
	if len(b) > 40 {
		t.Errorf("a heartbeat takes %d bytes", len(b))
	}
}

func TestMessagesSurviveTheCodecInAnyOrder(t *testing.T) {
	c, d := newCodec(), newCodec()
	h := head{Kind: kVote, From: "a", Incarnation: 5, Raised: 1, Seq: 9, Target: "b", Verdict: vRefused, Nonce: 1 << 63, Echo: 3, More: true}
	u := update{Name: "b", Addr: "\x7f\x00\x00\x01\x1f\x0a", Incarnation: 5, Status: StatusFailed, Tags: "a=b", Age: 3, By: "c"}
	e := update{Name: "b", Event: "deploy", Payload: []byte{0, 1, 255}, LTime: 4, Coalesce: true}
	b := c.update(c.update(c.head(nil, &h), &u), &e)
	for range 3 { // any message can be the first, and lost ones are not missed
		gotH, rest, err := d.readHead(b)
		if err != nil {
			t.Fatal(err)
		}
		gotU, rest, err := d.readUpdate(rest)
		if err != nil {
			t.Fatal(err)
		}
		gotE, rest, err := d.readUpdate(rest)
		if err != nil || len(rest) > 0 {
			t.Fatal(err, rest)
		}
		if diff := cmp.Diff([]any{h, u, e}, []any{gotH, gotU, gotE}); diff != "" {
			t.Error(diff)
		}
	}
	if got, _, err := d.readHead(c.head(nil, &head{Kind: kPing})); err != nil || got != (head{Kind: kPing}) {
		t.Errorf("a message keeps something of the one before: %+v, %v", got, err)
	}
}

func TestTheDecoderRefusesWhatItDoesNotKnow(t *testing.T) {
	c := newCodec()
	good := c.head(nil, &head{Kind: kPing, From: "a"})
	for name, b := range map[string][]byte{
		"nothing":           {},
		"a cut message":     good[:len(good)-1],
		"an update":         c.update(nil, &update{Name: "a"}),
		"a type definition": wireTypes.definitions,
		"a huge length":     {0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"a length lie":      append([]byte{0x7f}, good[1:]...),
	} {
		if _, _, err := c.readHead(b); err == nil {
			t.Errorf("%s decodes", name)
		}
	}
	if _, _, err := c.readHead(good); err != nil {
		t.Errorf("after bad messages a good one fails: %v", err)
	}
}

func newTestSeal(t *testing.T, cluster string, keys ...string) *seal {
	var ks [][]byte
	for _, k := range keys {
		ks = append(ks, bytes.Repeat([]byte(k), 32))
	}
	s, err := newSeal(cluster, ks)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatASealRefusesAndWhy(t *testing.T) {
	for _, c := range []struct {
		fact     string
		from, to *seal
		want     error
	}{
		{"no keys", newTestSeal(t, ""), newTestSeal(t, ""), nil},
		{"one key", newTestSeal(t, "x", "k"), newTestSeal(t, "x", "k"), nil},
		{"the second key opens too", newTestSeal(t, "", "l"), newTestSeal(t, "", "k", "l"), nil},
		{"another cluster", newTestSeal(t, "x", "k"), newTestSeal(t, "y", "k"), denials[denyCluster]},
		{"another key", newTestSeal(t, "", "l"), newTestSeal(t, "", "k"), denials[denyKey]},
		{"the sender lacks a key", newTestSeal(t, ""), newTestSeal(t, "", "k"), denials[denyKeyed]},
		{"the receiver lacks a key", newTestSeal(t, "", "k"), newTestSeal(t, ""), denials[denyKeyless]},
	} {
		d, err := c.to.openDatagram(c.from.closeDatagram([]byte("hi"), "b"), "b")
		if err != c.want || err == nil && string(d) != "hi" {
			t.Errorf("%s: datagram %q, %v", c.fact, d, err)
		}
		f, err := c.to.readFrame(bytes.NewReader(c.from.closeFrame([]byte("hi"), true)), true, func() {})
		if err != c.want || err == nil && string(f) != "hi" {
			t.Errorf("%s: frame %q, %v", c.fact, f, err)
		}
	}
}

func TestASealedMessageIsForItsReceiverAndDirectionOnly(t *testing.T) {
	s := newTestSeal(t, "", "k")
	b := s.closeDatagram([]byte("secret web1"), "b")
	if _, err := s.openDatagram(b, "c"); err != denials[denyKey] {
		t.Errorf("c opens what was for b: %v", err)
	}
	f := s.closeFrame([]byte("secret web1"), true)
	if _, err := s.readFrame(bytes.NewReader(f), false, func() {}); err != denials[denyKey] {
		t.Errorf("a frame can be sent back: %v", err)
	}
	if bytes.Contains(b, []byte("web1")) || bytes.Contains(f, []byte("web1")) {
		t.Error("the text shows")
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := s.openDatagram(bad, "b"); err == nil {
			t.Errorf("a flipped bit in byte %d goes unnoticed", i)
		}
	}
}

func TestSomethingElseOnThePortIsNamed(t *testing.T) {
	s := newTestSeal(t, "")
	_, err := s.readFrame(strings.NewReader("HTTP/1.1 400 Bad Request\r\n\r\n"), false, func() {})
	if err == nil || !strings.Contains(err.Error(), "no hamlet agent") || !strings.Contains(err.Error(), "HTTP/1.1") {
		t.Errorf("got %v", err)
	}
	_, err = s.readFrame(strings.NewReader("hm\x01\x00\xff\xff\xff\xff"), false, func() {})
	if err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a giant frame: %v", err)
	}
}

func TestSeedsMayHaveNoPort(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1": "127.0.0.1:7946", "127.0.0.1:8000": "127.0.0.1:8000",
		"::1": "[::1]:7946", "[::1]": "[::1]:7946", "[::1]:8000": "[::1]:8000",
		"[fe80::1%lo]:8000": "[fe80::1%lo]:8000", "::ffff:10.0.0.1": "10.0.0.1:7946",
	} {
		addrs, errs := resolve(t.Context(), []string{in})
		if len(errs) > 0 || len(addrs) != 1 || addrs[0] != netip.MustParseAddrPort(want) {
			t.Errorf("%s: %v %v", in, addrs, errs)
		}
	}
	if _, errs := resolve(t.Context(), []string{"127.0.0.1:x", "127.0.0.1:65536"}); len(errs) != 2 {
		t.Errorf("bad ports: %v", errs)
	}
}

// FuzzDatagram: whatever arrives is decoded or refused, without a panic, and
// what decodes encodes to something that decodes to the same.
func FuzzDatagram(f *testing.F) {
	c := newCodec()
	f.Add(c.head(nil, &head{Kind: kPing, From: "a", Target: "b", Seq: 1}))
	f.Add(c.update(c.head(nil, &head{Kind: kFlood, From: "a"}), &update{Name: "b", Status: StatusAlive, Incarnation: 9}))
	f.Add(wireTypes.definitions)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, rest, err := c.readHead(b)
		if err != nil {
			return
		}
		if again, _, err := c.readHead(c.head(nil, &h)); err != nil || again != h {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
		for len(rest) > 0 {
			var u update
			if u, rest, err = c.readUpdate(rest); err != nil {
				return
			}
			u.member()
			if again, _, err := c.readUpdate(c.update(nil, &u)); err != nil || !cmp.Equal(again, u) && len(u.Payload) > 0 {
				t.Fatalf("%+v became %+v, %v", u, again, err)
			}
		}
	})
}

// FuzzFrame: whatever a stream brings ends in frames or in an error.
func FuzzFrame(f *testing.F) {
	plain, _ := newSeal("", nil)
	keyed, _ := newSeal("", [][]byte{make([]byte, 32)})
	f.Add(plain.closeFrame([]byte("x"), true))
	f.Add(keyed.closeFrame([]byte("x"), true))
	f.Add([]byte("HTTP/1.1 200 OK\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range []*seal{plain, keyed} {
			r := bytes.NewReader(b)
			for {
				data, err := s.readFrame(r, true, func() {})
				if err != nil {
					break
				}
				if len(data) > len(b) {
					t.Fatal("more came out than went in")
				}
			}
		}
	})
}
