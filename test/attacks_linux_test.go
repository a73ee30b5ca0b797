package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// wiretap collects what passes the loopback interface to or from some ports.
type wiretap struct {
	fd    int
	ports []uint16
	mu    sync.Mutex
	seen  map[string][]byte // by "udp" and "tcp"
	done  chan struct{}
}

// tapLoopback needs root.
func tapLoopback(t *testing.T, ports ...uint16) *wiretap {
	const everything = syscall.ETH_P_ALL>>8 | syscall.ETH_P_ALL&0xff<<8 // in network order
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, everything)
	if errors.Is(err, syscall.EPERM) {
		t.Skip("SKIPPED: only root may look at the wire")
	} else if err != nil {
		t.Fatal(err)
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(syscall.Bind(fd, &syscall.SockaddrLinklayer{Protocol: everything, Ifindex: lo.Index}),
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, 64<<20),
		syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Usec: 100_000}))
	if err != nil {
		t.Fatal(err)
	}
	w := &wiretap{fd: fd, ports: ports, seen: make(map[string][]byte), done: make(chan struct{})}
	go w.listen()
	return w
}

func (w *wiretap) listen() {
	defer close(w.done)
	for buf := make([]byte, 1<<17); ; {
		n, from, err := syscall.Recvfrom(w.fd, buf, 0)
		if err == syscall.EAGAIN || err == syscall.EINTR {
			continue
		} else if err != nil {
			return
		}
		if ll, ok := from.(*syscall.SockaddrLinklayer); ok && ll.Pkttype == syscall.PACKET_OUTGOING || n < 14+20+8 || buf[14]>>4 != 4 {
			continue // each packet shows on lo twice
		}
		ip := buf[14:n]
		proto := map[byte]string{syscall.IPPROTO_UDP: "udp", syscall.IPPROTO_TCP: "tcp"}[ip[9]]
		body := ip[4*int(ip[0]&15):]
		if proto == "" || len(body) < 8 || !slices.ContainsFunc(w.ports, func(p uint16) bool {
			return binary.BigEndian.Uint16(body) == p || binary.BigEndian.Uint16(body[2:]) == p
		}) {
			continue
		}
		w.mu.Lock()
		w.seen[proto] = append(w.seen[proto], body...)
		w.mu.Unlock()
	}
}

func (w *wiretap) bytes(proto string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.seen[proto])
}

func (w *wiretap) stop() {
	syscall.Shutdown(w.fd, syscall.SHUT_RD)
	syscall.Close(w.fd)
	<-w.done
}

func TestKeyHidesNamesTagsAndEventsOnTheWire(t *testing.T) {
	secrets := []string{"secret-red", "secret-green", "secret-role", "secret-event", "secret-payload"}
	for name, keys := range map[string][]string{"with a key": testKeys[:1], "without a key": nil} {
		t.Run(name, func(t *testing.T) {
			binds := freeAddrs(t, "127.0.0.77", 2)
			w := tapLoopback(t, netip.MustParseAddrPort(binds[0]).Port(), netip.MustParseAddrPort(binds[1]).Port())
			defer w.stop()
			red := startKeyed(t, keys, "-node", secrets[0], "-bind", binds[0], "-role", secrets[2])
			green := startKeyed(t, keys, "-node", secrets[1], "-bind", binds[1], "-join", binds[0])
			red.waitStatus(green.name, "alive")
			green.waitStatus(red.name, "alive")
			red.run("event", secrets[3], secrets[4])
			green.waitLog("user-event")
			green.int() // its leave is on the wire, too
			green.wait()
			red.waitStatus(green.name, "left")
			for proto, all := range map[string]int{"udp": 4, "tcp": 3} { // events travel by UDP, a newcomer hears of roles by TCP
				found := 0
				eventually(t, "the tap has it", func() bool {
					found = 0
					for _, s := range secrets {
						if bytes.Contains(w.bytes(proto), []byte(s)) {
							found++
						}
					}
					return len(w.bytes(proto)) > 500 && (found >= all || keys != nil)
				})
				t.Logf("%d of %d names, tags and events in %d bytes of %s", found, len(secrets), len(w.bytes(proto)), proto)
				if keys != nil && found > 0 {
					t.Errorf("%s shows %d of the %d names, tags and events", proto, found, len(secrets))
				}
			}
		})
	}
}

// vanish makes a connection half-open: this end is gone, and the other one is
// not told.
func vanish(c net.Conn) error {
	const tcpRepair = 19
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) { serr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpRepair, 1) })
	return errors.Join(err, serr, c.Close())
}

func TestAcceptorTakesPeersDespiteHalfOpenConnections(t *testing.T) {
	t.Parallel()
	was := capture(t)
	agents := startCluster(t, "red", "green")
	red, call := agents[0], string(was.rpc[0].said)
	used := watchUsage(t, red)
	for i := range 800 {
		addr, first := red.bind, was.hello[:i%len(was.hello)]
		if i%4 == 0 {
			addr, first = red.rpc, call[:i%len(call)]
		}
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte(first))
		if err := vanish(c); errors.Is(err, syscall.EPERM) {
			t.Skip("SKIPPED: only root can make half-open connections")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	held := red.fds()
	start := time.Now()
	startAgent(t, "-node", "black", "-join", red.advertised)
	agents[1].waitStatus("black", "alive")
	joined := time.Since(start)
	if _, errs, code := red.run("members"); code != 0 {
		t.Errorf("members: %s", errs)
	}
	t.Logf("the agent held %d file descriptors, and a member joined in %v", held, joined.Round(time.Millisecond))
	used.check(t)
}

func TestHandlerAndItsChildrenHaveNoKeyInTheirEnvironment(t *testing.T) {
	t.Parallel()
	cmd := hamletCmd(agentArgs("-event-handler", "member-join=sleep 60")...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+testKeys[0])
	a := startAgentCmd(t, cmd)
	var env []byte
	eventually(t, "the handler's sleep", func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", a.cmd.Process.Pid))
		for _, file := range threads {
			children, _ := os.ReadFile(file)
			for _, pid := range strings.Fields(string(children)) {
				if env, _ = os.ReadFile("/proc/" + pid + "/environ"); bytes.Contains(env, []byte("SERF_EVENT=")) {
					return true
				}
			}
		}
		return false
	})
	if bytes.Contains(env, []byte(testKeys[0][:12])) {
		t.Errorf("/proc shows the key in the environment of a handler: %q", env)
	}
}
