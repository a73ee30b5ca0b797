// line_linux_test.go: hosts that are far from each other. Where a world has a
// switch, a far world has a line: packets take their time, and some are lost.
// It needs no module of the kernel but TUN.

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

const lineQueue = 4096 // packets on their way from one host to another

// trip is what a packet meets between two hosts.
type trip struct {
	delay  time.Duration
	jitter time.Duration // at most so much more; packets stay in order
	loss   float64       // 1: nothing arrives
}

// route says what a packet of host from meets on its way to host to.
type route func(from, to int) trip

// line connects the hosts of a world. Each has a TUN device as its eth0, and
// the other end of all of them is here.
type line struct {
	seed  uint64
	route atomic.Pointer[route]
	hosts []*lineHost // by number; nobody is 0
	done  chan struct{}
}

type lineHost struct {
	number         int
	tun            *os.File
	queues         []chan parcel // to each host
	packets, bytes atomic.Int64  // sent to other hosts, with IP headers
}

type parcel struct {
	due time.Time
	ip  []byte
}

// nearby is a route that takes no time and loses nothing.
func nearby(from, to int) trip { return trip{} }

// regions is a route among hosts in n regions: far between them, near within.
func regions(n int, far trip) route {
	return func(from, to int) trip {
		if from%n == to%n {
			return trip{}
		}
		return far
	}
}

// newFarWorld is newWorld with a line. Its hosts have IPv4 only.
func newFarWorld(t *testing.T, hosts int, r route) *world {
	t.Helper()
	needNamespaces(t)
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("SKIPPED: no line that delays without TUN devices: %v", err)
	}
	w := newHosts(t, hosts)
	w.line = &line{seed: rand.Uint64(), hosts: make([]*lineHost, hosts+1), done: make(chan struct{})}
	w.line.route.Store(&r)
	t.Cleanup(w.line.close)
	t.Logf("seed of the line: %d", w.line.seed)

	for i := 1; i <= hosts; i++ {
		h := &lineHost{number: i, queues: make([]chan parcel, hosts+1)}
		var err error
		w.inside(i, func() { h.tun, err = openTUN("eth0") })
		if err != nil {
			t.Skipf("SKIPPED: no line that delays: cannot make a TUN device: %v", err)
		}
		w.line.hosts[i] = h
		w.ip(i, "link set lo up", fmt.Sprintf("addr add 10.77.0.%d/24 dev eth0", i), "link set eth0 addrgenmode none up")
	}
	for _, h := range w.line.hosts[1:] {
		for to := range h.queues[1:] {
			h.queues[to+1] = make(chan parcel, lineQueue)
			go w.line.deliver(h.queues[to+1], to+1)
		}
		go w.line.carry(h)
	}
	return w
}

// openTUN makes a network device in the namespace of this thread. What the
// kernel sends out there is read from the file, a packet at a time.
func openTUN(name string) (*os.File, error) {
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var request struct { // ifreq
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], name)
	request.flags = syscall.IFF_TUN | syscall.IFF_NO_PI
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TUNSETIFF, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		syscall.Close(fd)
		return nil, errno
	}
	if err := syscall.SetNonblock(fd, true); err != nil { // so that Close ends a Read
		syscall.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tun"), nil
}

func (l *line) close() {
	close(l.done)
	for _, h := range l.hosts {
		if h != nil {
			h.tun.Close()
		}
	}
}

// use changes what packets meet from now on.
func (l *line) use(r route) { l.route.Store(&r) }

// cut makes hosts that are cut off from all hosts of the other kind.
func (l *line) cut(away func(host int) bool) {
	before := *l.route.Load()
	l.use(func(from, to int) trip {
		if away(from) != away(to) {
			return trip{loss: 1}
		}
		return before(from, to)
	})
}

// carry takes what a host sends and puts it on its way.
func (l *line) carry(h *lineHost) {
	dice := rand.New(rand.NewPCG(l.seed, uint64(h.number)))
	for buf := make([]byte, 1<<16); ; {
		n, err := h.tun.Read(buf)
		if err != nil {
			return
		}
		to := l.receiver(buf[:n])
		if to == 0 {
			continue
		}
		h.packets.Add(1)
		h.bytes.Add(int64(n))

		t := (*l.route.Load())(h.number, to)
		late := t.delay + time.Duration(dice.Float64()*float64(t.jitter))
		if dice.Float64() < t.loss {
			continue
		}
		select {
		case h.queues[to] <- parcel{time.Now().Add(late), append([]byte(nil), buf[:n]...)}:
		default: // a queue that is full loses packets, as a router's does
		}
	}
}

// receiver is the host that an IPv4 packet is for; 0: none.
func (l *line) receiver(ip []byte) int {
	if len(ip) < 20 || ip[0]>>4 != 4 || ip[16] != 10 || ip[17] != 77 || ip[18] != 0 || int(ip[19]) >= len(l.hosts) {
		return 0
	}
	return int(ip[19])
}

func (l *line) deliver(queue <-chan parcel, to int) {
	for {
		select {
		case <-l.done:
			return
		case p := <-queue:
			time.Sleep(time.Until(p.due))
			l.hosts[to].tun.Write(p.ip) // an interface that is down takes nothing
		}
	}
}

// sent is what hosts have sent to others so far.
func (l *line) sent(hosts ...int) (packets, bytes float64) {
	for _, i := range hosts {
		packets += float64(l.hosts[i].packets.Load())
		bytes += float64(l.hosts[i].bytes.Load())
	}
	return packets, bytes
}

// rate is what hosts send, each, in a second of the window that begins now.
func (l *line) rate(window time.Duration, hosts ...int) (packets, bytes float64) {
	began := time.Now()
	packets0, bytes0 := l.sent(hosts...)
	time.Sleep(window)
	packets1, bytes1 := l.sent(hosts...)
	each := time.Since(began).Seconds() * float64(len(hosts))
	return (packets1 - packets0) / each, (bytes1 - bytes0) / each
}

func hostsOf(as []*agent) (hosts []int) {
	for _, a := range as {
		hosts = append(hosts, a.host)
	}
	return hosts
}

// ---- the line itself ----

func TestLineDelaysAndLosesWhatItIsTold(t *testing.T) {
	t.Parallel()
	const delay, count = 100 * ms, 400
	w := newFarWorld(t, 2, func(from, to int) trip {
		if from == 1 {
			return trip{delay: delay, jitter: 20 * ms, loss: .25}
		}
		return trip{delay: delay}
	})
	var at, from *net.UDPConn
	w.inside(2, func() { at = listenUDP(t, "10.77.0.2:9") })
	w.inside(1, func() { from = listenUDP(t, "10.77.0.1:9") })
	go func() {
		for i := range uint32(count) {
			from.WriteToUDPAddrPort(binary.BigEndian.AppendUint32(nil, i), netip.MustParseAddrPort("10.77.0.2:9"))
			time.Sleep(ms)
		}
	}()

	began := time.Now()
	var took time.Duration
	arrived, last := 0, -1
	at.SetReadDeadline(began.Add(5 * time.Second))
	for buf := make([]byte, 100); last < count-20; arrived++ {
		n, _, err := at.ReadFromUDP(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil || n != 4 {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if arrived == 0 {
			took = time.Since(began)
		}
		number := int(binary.BigEndian.Uint32(buf))
		if number <= last {
			t.Errorf("number %d arrives after number %d", number, last)
		}
		last = number
	}
	t.Logf("the first of %d took %v", arrived, took)
	if took < delay || took > delay+500*ms {
		t.Errorf("a packet took %v, want about %v", took, delay)
	}
	if arrived < count/2 || arrived > count*9/10 {
		t.Errorf("%d of %d arrived, want about three of four", arrived, count)
	}
	if packets, _ := w.line.sent(1); packets != count {
		t.Errorf("the line counts %v packets, want %d", packets, count)
	}
}

func listenUDP(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
