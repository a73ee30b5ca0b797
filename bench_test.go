// bench_test.go: what the core alone takes. What agents take is measured from
// outside (make bench).

package main

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func BenchmarkHeartbeat(b *testing.B) {
	n := benchNode(1000)
	p := n.preds[0]
	h := head{Kind: kHeartbeat, From: p.e.Name, Incarnation: p.e.Incarnation, Digest: n.digest(), Promise: 2000, Seq: 7}
	data := n.Codec.head(nil, &h)
	b.Run("encode", func(b *testing.B) {
		for b.Loop() {
			data = n.Codec.head(data[:0], &h)
		}
		b.ReportMetric(float64(len(data)), "bytes")
	})
	b.Run("decode", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := n.Codec.readHead(data); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("handle", func(b *testing.B) {
		for b.Loop() {
			p.beat = 0
			if err := n.datagram(n.real, p.e.Addr, data); err != nil || p.beat != h.Seq {
				b.Fatal("the heartbeat was not taken", err)
			}
		}
	})
}

func BenchmarkIdleTick(b *testing.B) {
	n := benchNode(1000)
	b.Run("nothing is due", func(b *testing.B) {
		for b.Loop() {
			if out := benchTick(n, 0); len(out.packets) > 0 {
				b.Fatalf("the node sends %d packets", len(out.packets))
			}
		}
	})
	b.Run("a heartbeat is due", func(b *testing.B) {
		sent := 0
		for b.Loop() {
			sent += len(benchTick(n, n.planned).packets)
		}
		if sent < b.N*9/10 || sent > b.N {
			b.Fatalf("the node sent %d packets in %d ticks", sent, b.N)
		}
	})
}

func BenchmarkRings(b *testing.B) {
	n := benchNode(1000)
	b.Run("watchers", func(b *testing.B) {
		for b.Loop() {
			n.t.watchers(n.self)
		}
	})
	b.Run("watched", func(b *testing.B) {
		for b.Loop() {
			n.t.watched(n.self)
		}
	})
	b.Run("all after a change", func(b *testing.B) {
		for b.Loop() {
			n.t.version++
			n.refreshRing()
		}
	})
}

// benchNode returns a node that knows count members and has nothing left to do.
func benchNode(count int) *node {
	n := newNode(nodeConfig{Self: benchMember(0), ReapAfter: 24 * time.Hour, Codec: newCodec()}, 0)
	for i := 1; i < count; i++ {
		n.t.apply(n.now, benchMember(i), 0)
	}
	n.everJoined = true
	for range 3 {
		benchTick(n, n.planned)
		n.streams = nil // the watch links would wait for an answer
	}
	return n
}

func benchMember(i int) Member {
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 7946)
	return Member{Name: fmt.Sprintf("n%d", i), Addr: addr, Incarnation: 1386489408000, Born: 1386489408000, Status: StatusAlive}
}

// benchTick ticks as if everybody had been heard of just now.
func benchTick(n *node, after time.Duration) outputs {
	for _, p := range n.preds {
		p.due = n.now + time.Minute
	}
	n.heard = n.now
	n.tick(n.real + after)
	return n.take()
}
