// What an agent makes of names and addresses: a resolver that is slow or dead, an interface without an address,
// networks with link-local addresses or IPv6 alone.

package test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nameServer answers questions on the host for the addresses of names. A name without addresses of a family, or
// with none at all, is answered so, too; for a name in silent no AAAA record is answered.
func (w *world) nameServer(host int, at string, names map[string][]string, silent string) {
	w.Helper()
	var conn net.PacketConn
	var err error
	w.inside(host, func() { conn, err = net.ListenPacket("udp", at+":53") })
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { conn.Close() })
	go func() {
		for buf := make([]byte, 512); ; {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := dnsAnswer(buf[:n], names, silent); answer != nil {
				conn.WriteTo(answer, from)
			}
		}
	}()
}

// dnsAnswer answers a question; nil: it does not.
func dnsAnswer(question []byte, names map[string][]string, silent string) []byte {
	const typeA, typeAAAA = 1, 28
	var labels []string
	end := 12
	for question[end] > 0 {
		size := int(question[end])
		labels = append(labels, string(question[end+1:end+1+size]))
		end += 1 + size
	}
	end++
	name, kind := strings.Join(labels, "."), binary.BigEndian.Uint16(question[end:])
	if kind == typeAAAA && name == silent {
		return nil
	}

	var records []byte
	count := byte(0)
	for _, s := range names[name] {
		ip := netip.MustParseAddr(s)
		if ip.Is4() != (kind == typeA) {
			continue
		}
		count++
		records = append(records, 0xc0, 12, 0, byte(kind), 0, 1, 0, 0, 0, 1, 0, byte(len(ip.AsSlice())))
		records = append(records, ip.AsSlice()...)
	}
	status := byte(0)
	if names[name] == nil {
		status = 3 // there is no such name
	}
	header := []byte{question[0], question[1], 0x81, 0x80 | status, 0, 1, 0, count, 0, 0, 0, 0}
	return append(append(header, question[12:end+4]...), records...)
}

// resolvers is a prelude of an agent for which these are the name servers.
func (w *world) resolvers(servers ...string) string {
	w.Helper()
	file := filepath.Join(w.TempDir(), "resolv.conf")
	text := "nameserver " + strings.Join(servers, "\nnameserver ") + "\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		w.Fatal(err)
	}
	return fmt.Sprintf(`exec unshare -m sh -c 'mount --bind %s /etc/resolv.conf && exec "$0" "$@"' "$0" "$@"`, file)
}

// silentServer has a name server on the host that never answers.
func (w *world) silentServer(host int, at string) {
	w.Helper()
	var conn net.PacketConn
	var err error
	w.inside(host, func() { conn, err = net.ListenPacket("udp", at+":53") })
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { conn.Close() })
}

func slowResolver(w *world) {
	w.ip(1, "addr add 10.77.0.201/24 dev eth0", "addr add 10.77.0.202/24 dev eth0")
	names := map[string][]string{"seed.test": {"10.77.0.1"}, "a.test": {"10.77.0.1"}}
	w.silentServer(1, "10.77.0.201")
	w.nameServer(1, "10.77.0.202", names, "a.test")
	a := w.start(1)

	// A name server that is dead costs five seconds in the resolver, another one's AAAA that never comes nothing.
	b := w.spawn(w.resolvers("10.77.0.202"), 2, "-join", "a.test")
	took := w.until(2*time.Second, func() string { return "joined without an AAAA" }, func() bool { return a.status("n2") == "alive" })
	w.Logf("without an AAAA: joined after %v", took)
	b.signal(syscall.SIGINT)
	b.exit(3 * time.Second)
	c := w.spawn(w.resolvers("10.77.0.201", "10.77.0.202"), 2, "-node", "n3", "-join", "seed.test")
	took = w.until(7*time.Second, func() string { return "joined with a dead name server" }, func() bool { return a.status("n3") == "alive" })
	w.Logf("with a dead name server: joined after %v", took)
	if c.find(time.Time{}, "[WARN]") != nil {
		w.Errorf("it warns:\n%s", c.log(10))
	}
	c.signal(syscall.SIGINT)
	c.exit(3 * time.Second)
	d := w.spawn(w.resolvers("10.77.0.201", "10.77.0.202"), 2, "-node", "n4")
	d.waitBanner()
	if out, errs, code := d.run("join", "seed.test"); code != 0 {
		w.Errorf("the join command: exit status %d, %s%s", code, out, errs)
	}
}

func hangingResolver(w *world) {
	w.ip(1, "addr add 10.77.0.201/24 dev eth0")
	w.silentServer(1, "10.77.0.201")
	b := w.spawn(w.resolvers("10.77.0.201"), 2, "-join", "seed.test", "-join", "10.77.0.1")
	b.waitBanner()
	time.Sleep(1500 * time.Millisecond)
	a := w.start(1)
	w.agree(3*time.Second, everybody(2), a, b)
	b.signal(syscall.SIGINT)
	if code := b.exit(1500 * time.Millisecond); code != 0 {
		w.Errorf("exit status %d", code)
	}

	// Until there is an agent, a signal ends what is looked up as well.
	c := w.spawn(w.resolvers("10.77.0.201"), 2, "-bind", "seed.test")
	time.Sleep(300 * time.Millisecond)
	c.signal(syscall.SIGINT)
	c.exit(time.Second)
}

func oneFamilyAnswers(w *world) {
	w.nameServer(1, "10.77.0.1", map[string][]string{"seed.test": {"fd77::1", "10.77.0.1"}}, "")
	resolvers := w.resolvers("10.77.0.1")
	a := w.spawn(resolvers, 1, "-bind", "0.0.0.0:7946", "-join", "seed.test")
	a.waitBanner()
	b := w.spawn(resolvers, 2, "-bind", "0.0.0.0:7946", "-join", "seed.test")
	w.agree(3*time.Second, everybody(2), a, b)
	time.Sleep(time.Second)
	for _, c := range []*agent{a, b} {
		if l := c.find(time.Time{}, "[WARN]"); l != nil {
			w.Errorf("%s warns: %s", c.name, l.text)
		}
	}
}

func interfaceWithoutAddress(w *world) {
	w.ip(2, "addr flush dev eth0")
	a := w.start(1)
	b := w.start(2, "-iface", "eth0", "-join", "10.77.0.1")
	time.Sleep(1500 * time.Millisecond)
	mark := time.Now()
	w.ip(2, "addr add 10.77.0.22/24 dev eth0")
	w.agree(2*time.Second, everybody(2), a, b)
	w.Logf("joined %v after the address had come", time.Since(mark))
	if got := a.member("n2").Addr; got != "10.77.0.22:7946" {
		w.Errorf("n2 told n1 the address %s", got)
	}
	if n := b.count("eth0 has no address yet"); n != 1 {
		w.Errorf("want one line about it:\n%s", b.log(10))
	}
	settled := time.Now()
	time.Sleep(2 * time.Second)
	w.silent(settled, "", a, b)
}

func nameWithoutAddress(w *world) {
	a := w.start(1)
	b := w.spawn(w.resolvers("10.77.0.1"), 2, "-advertise", "n2.test:7946", "-join", "10.77.0.1")
	b.waitBanner()
	c := w.spawn(w.resolvers("10.77.0.1"), 2, "-node", "n3", "-bind", "0.0.0.0:7000", "-rpc-addr", "127.0.0.1:7001", "-advertise", "n3.test")
	c.waitBanner()
	b.waitLog("joins as soon as it has an address")
	if _, errs, code := c.run("join", "10.77.0.1"); code != 1 || !strings.Contains(errs, "n3.test") {
		w.Errorf("the join command: exit status %d, %s", code, errs)
	}
	// Nobody learns an address that is only a stopgap.
	if _, _, code := a.run("join", "10.77.0.2:7000"); code != 1 {
		w.Errorf("a node without an address is joined: exit status %d", code)
	}
	c.signal(syscall.SIGINT)
	if code := c.exit(1500 * time.Millisecond); code != 0 {
		w.Errorf("exit status %d", code)
	}

	mark := time.Now()
	w.nameServer(1, "10.77.0.1", map[string][]string{"n2.test": {"10.77.0.2"}}, "")
	w.agree(8*time.Second, everybody(2), a, b)
	w.Logf("joined %v after the name had come", time.Since(mark))
	if n := b.count("[WARN]"); n != 1 {
		w.Errorf("want one line about it:\n%s", b.log(10))
	}
}

func onlyLinkLocal(w *world) {
	var c []*agent
	for i := 1; i <= 3; i++ {
		w.ip(i, "addr flush dev eth0", fmt.Sprintf("addr add 169.254.10.%d/16 dev eth0", i))
		c = append(c, w.start(i, "-join", "169.254.10.1"))
	}
	w.agree(3*time.Second, everybody(3), c...)
	for i := 1; i <= 3; i++ {
		if got, want := c[0].member(fmt.Sprint("n", i)).Addr, fmt.Sprintf("169.254.10.%d:7946", i); got != want {
			w.Errorf("n%d advertises %s", i, got)
		}
	}
	w.staysSo(c...)
}

// ipv6JoinsBoth has a host with IPv6 alone, which joins one with both families.
func ipv6JoinsBoth(w *world) {
	w.ip(2, "addr del 10.77.0.2/24 dev eth0")
	a := w.start(1, "-bind", "[::]:7946")
	b := w.start(2, "-join", "fd77::1")
	w.agree(3*time.Second, everybody(2), a, b)
	w.staysSo(a, b)
}

// staysSo demands that nothing happens any more and that every agent answers a query.
func (w *world) staysSo(c ...*agent) {
	w.Helper()
	mark := time.Now()
	time.Sleep(3 * time.Second)
	w.silent(mark, "", c...)
	for _, a := range c {
		if out, errs, code := a.run("query", "-timeout", "3s", "load"); code != 0 {
			w.Errorf("a query of %s: exit status %d, %s%s", a.name, code, out, errs)
		}
		if l := a.find(time.Time{}, "[WARN]"); l != nil {
			w.Errorf("%s warns: %s", a.name, l.text)
		}
	}
}

func ipv6ByDefault(w *world) {
	for i := 1; i <= 3; i++ {
		w.ip(i, fmt.Sprintf("addr del 10.77.0.%d/24 dev eth0", i))
	}
	refused := w.start(3, "-bind", "0.0.0.0:7946", "-join", "fd77::1")
	refused.waitLog("-bind [::]:7946")
	refused.signal(syscall.SIGTERM)
	refused.exit(3 * time.Second)

	if l := refused.find(time.Time{}, "advertising 127.0.0.1:7946"); l == nil || !strings.Contains(l.text, "-bind [::]:7946") {
		w.Errorf("it does not say how to listen on IPv6:\n%s", refused.log(10))
	}

	w.nameServer(1, "[fd77::1]", map[string][]string{"seed.test": {"fd77::1"}}, "")
	c := []*agent{w.start(1), w.start(2, "-join", "fd77::1")}
	c = append(c, w.spawn(w.resolvers("fd77::1"), 3, "-join", "seed.test"))
	w.agree(3*time.Second, everybody(3), c...)
	w.staysSo(c...)
}

// linkLocalIPv6Seed joins a seed by an address that has a zone. It works for a node that has another address to advertise.
func linkLocalIPv6Seed(w *world) {
	w.ip(1, "addr add fe80::77/64 dev eth0 nodad")
	w.ip(2, "addr flush dev eth0", "addr add fe80::2/64 dev eth0 nodad", "addr add fd77::2/64 dev eth0 nodad")
	w.ip(3, "addr flush dev eth0", "addr add fe80::3/64 dev eth0 nodad")
	a := w.start(1, "-advertise", "fd77::1")
	b := w.start(2, "-join", "fe80::77%eth0")
	c := w.start(3, "-join", "[fe80::77%eth0]:7946")
	w.agree(3*time.Second, everybody(2), a, b)
	if got := a.member("n2").Addr; got != "[fd77::2]:7946" {
		w.Errorf("n2 advertises %s", got)
	}
	c.waitLog("only a link-local IPv6 address")
	w.agree(0, everybody(2), a, b)
	w.staysSo(a, b)
}

// seedOnTwoNetworks has a seed whose default route does not lead to its members.
func seedOnTwoNetworks(w *world) {
	w.ip(1, "link add eth1 type veth peer name far", "link set far up", "link set eth1 up", "addr add 192.168.5.2/24 dev eth1",
		"route add default via 192.168.5.1", "addr add 10.77.0.100/24 dev eth0")
	a := w.start(1)
	c := []*agent{a, w.start(2, "-join", "10.77.0.1"), w.start(3, "-join", "10.77.0.1")}
	w.agree(3*time.Second, everybody(3), c...)
	for _, b := range c {
		if got := b.member("n1").Addr; got != "10.77.0.1:7946" {
			w.Errorf("%s knows n1 at %s", b.name, got)
		}
	}
	w.staysSo(c...)
}

func loneAddressChanges(w *world) {
	for _, args := range [][]string{nil, {"-iface", "eth0"}} {
		w.Run(fmt.Sprint(args), func(t *testing.T) {
			w := newWorld(t, 2)
			a := w.start(1, args...)
			w.ip(1, "addr del 10.77.0.1/24 dev eth0", "addr add 10.77.0.11/24 dev eth0")
			b := w.start(2, "-join", "10.77.0.11")
			w.agree(3*time.Second, everybody(2), a, b)
			if got := b.member("n1").Addr; got != "10.77.0.11:7946" {
				t.Errorf("n1 advertises %s", got)
			}
			w.staysSo(a, b)
		})
	}
}
