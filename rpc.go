// rpc.go: how the command line speaks to a running agent. One TCP connection
// carries one request and its answer.
//
// A request is a head (magic, SHA-256 of the token, length) and the bare gob
// value of a flat struct. The answer is the magic and a gob stream. Whatever
// does not begin with the magic (a browser, TLS, noise) never reaches gob.

package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"time"
)

const (
	rpcName     = "hamlet-rpc/"
	rpcMagic    = rpcName + "1\n"
	maxRequest  = 64 << 10
	maxAnswer   = 64 << 20
	maxRPCConns = 256

	rpcTimeout     = 5 * time.Second
	slowRPCTimeout = 10 * time.Second // a join or a leave takes the agent itself up to five
)

// cluster is what the RPC server needs of the gossip side.
type cluster interface {
	Members() []Member
	Join(addrs []string) (int, error)
	Leave() error
	ForceLeave(name string, prune bool) error
	UserEvent(name string, payload []byte, coalesce bool) error
}

// request is flat: a slice or a map could claim more elements than it brings.
type request struct {
	Op              string // members, join, leave, force-leave or event
	Addrs           string // separated by blanks
	Name            string
	Payload         []byte
	Prune, Coalesce bool
}

type answer struct {
	Error   string
	Refused bool // the token was missing or wrong
	Joined  int
	Members []Member
}

// packRequest encodes the value of r alone: gob does not allocate for what a
// stranger's definition of the type would claim.
func packRequest(r request) []byte { return newCodec().encode(nil, &r) }

func unpackRequest(b []byte) (r request, err error) {
	rest, err := newCodec().decode(b, wireTypes.request, &r)
	if err == nil && len(rest) > 0 {
		err = errors.New("malformed request")
	}
	return r, err
}

// callRPC asks the agent at addr and gives up after timeout.
func callRPC(addr, token string, req request, timeout time.Duration) (ans answer, err error) {
	deadline := time.Now().Add(timeout)
	conn, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return ans, unreachable(addr, timeout, err)
	}
	defer conn.Close()
	conn.SetDeadline(deadline)
	value, sum := packRequest(req), sha256.Sum256([]byte(token))
	if len(value) > maxRequest {
		return ans, fail("", "the request takes %d bytes, the limit is %d", len(value), maxRequest)
	}
	msg := binary.BigEndian.AppendUint32(append([]byte(rpcMagic), sum[:]...), uint32(len(value)))
	conn.Write(append(msg, value...)) // what goes wrong shows when reading
	in := io.LimitReader(conn, maxAnswer)
	magic := make([]byte, len(rpcMagic))
	n, err := io.ReadFull(in, magic)
	switch {
	case err == nil && string(magic) == rpcMagic:
	case bytes.HasPrefix(magic, []byte(rpcName)):
		return ans, fail(fmt.Sprintf("use one version for both; this is %s", version), "the agent at %s speaks another version of the RPC: %q", addr, magic[:n])
	case n > 0 || errors.Is(err, io.EOF):
		return ans, fail("-rpc-addr is the agent's RPC address (default "+defaultRPC+"), not the one that it gossips on",
			"what listens at %s is not the RPC of a hamlet agent", addr)
	default:
		return ans, unreachable(addr, timeout, err)
	}
	if err := gob.NewDecoder(in).Decode(&ans); err != nil {
		return ans, unreachable(addr, timeout, err)
	}
	switch {
	case ans.Refused && token == "":
		return ans, fail("give it with -rpc-auth or SERF_RPC_AUTH", "the agent at %s wants a token", addr)
	case ans.Refused:
		return ans, fail("-rpc-auth or SERF_RPC_AUTH must be what the agent was started with", "the agent at %s wants another token", addr)
	case ans.Error != "":
		return ans, fail("", "%s", ans.Error)
	}
	return ans, nil
}

// unreachable says why there was no answer; asking again may help.
func unreachable(addr string, timeout time.Duration, err error) error {
	f := &failure{msg: fmt.Sprintf("no agent answers at %s: %v", addr, reason(err)), code: 1, again: true,
		hint: fmt.Sprintf("is the agent running? start it with '%s agent', or say where it is with -rpc-addr or SERF_RPC_ADDR", prog)}
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		f.msg = fmt.Sprintf("the agent at %s did not answer within %v", addr, timeout.Round(time.Millisecond))
		f.hint = "it may be stopped or overloaded: look at its process and its log"
	}
	return f
}

// rpcServer answers requests about a cluster.
type rpcServer struct {
	ln      net.Listener
	cluster cluster
	token   string
	strange strangers
	guests  guests
}

// serveRPC answers what comes in at ln.
func serveRPC(ln net.Listener, c cluster, token string, logger *log.Logger) *rpcServer {
	s := &rpcServer{ln: ln, cluster: c, token: token, strange: strangers{log: logger}, guests: guests{limit: maxRPCConns}}
	s.guests.served.Go(func() { s.guests.accept(ln, &s.strange, s.serve) })
	return s
}

// Close takes no more requests and waits a second at most for the answers under way.
func (s *rpcServer) Close() {
	s.ln.Close()
	waitAtMost(time.Second, s.guests.served.Wait)
}

func (s *rpcServer) serve(conn *guest) {
	conn.SetDeadline(time.Now().Add(rpcTimeout))
	req, token, err := readRequest(conn)
	if errors.Is(err, errVersion) {
		io.WriteString(conn, rpcMagic)
		conn.Conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, io.LimitReader(conn, maxRequest)) // unread data would reset the connection
		return
	}
	if err != nil {
		if !errors.Is(err, io.EOF) { // it said nothing: somebody looks whether the port is open
			s.refuse(conn.RemoteAddr(), err)
		}
		return
	}
	conn.proven.Store(true)
	var ans answer
	want := sha256.Sum256([]byte(s.token))
	if s.token != "" && subtle.ConstantTimeCompare(token, want[:]) != 1 {
		s.refuse(conn.RemoteAddr(), errors.New("wrong or missing token"))
		ans.Refused = true
	} else {
		ans = s.answer(req)
	}
	conn.SetDeadline(time.Now().Add(rpcTimeout))
	buf := bytes.NewBufferString(rpcMagic)
	if err := gob.NewEncoder(buf).Encode(ans); err != nil {
		s.refuse(conn.RemoteAddr(), err)
	}
	conn.Write(buf.Bytes())
}

func (s *rpcServer) refuse(who net.Addr, err error) {
	s.strange.seen(who.(*net.TCPAddr).AddrPort().Addr().Unmap(), fmt.Errorf("RPC: %w", err))
}

var errVersion = errors.New("another version of the RPC")

// readRequest reads one request and the hash of the token that it brings.
func readRequest(r io.Reader) (req request, token []byte, err error) {
	head := make([]byte, len(rpcMagic)+sha256.Size+4)
	magic, rest := head[:len(rpcMagic)], head[len(rpcMagic):]
	if _, err := io.ReadFull(r, magic); err != nil {
		return req, nil, err
	}
	if string(magic) != rpcMagic {
		if strings.HasPrefix(string(magic), rpcName) {
			return req, nil, errVersion
		}
		return req, nil, errors.New("this is not hamlet's RPC protocol")
	}
	if _, err := io.ReadFull(r, rest); err != nil {
		return req, nil, err
	}
	size := binary.BigEndian.Uint32(rest[sha256.Size:])
	if size > maxRequest {
		return req, nil, fmt.Errorf("a request of %d bytes, the limit is %d", size, maxRequest)
	}
	value := make([]byte, size)
	if _, err := io.ReadFull(r, value); err != nil {
		return req, nil, err
	}
	req, err = unpackRequest(value)
	return req, rest[:sha256.Size], err
}

// answer does what the request asks for.
func (s *rpcServer) answer(req request) (ans answer) {
	var err error
	switch req.Op {
	case "members":
		ans.Members = s.cluster.Members()
	case "join":
		ans.Joined, err = s.cluster.Join(strings.Fields(req.Addrs))
		if ans.Joined > 0 {
			err = nil // some others may not have answered
		}
	case "leave":
		s.strange.log.Print("[INFO] told to leave the cluster")
		s.ln.Close() // who reads the answer may start the next agent at once
		err = s.cluster.Leave()
	case "force-leave":
		err = s.cluster.ForceLeave(req.Name, req.Prune)
	case "event":
		err = s.cluster.UserEvent(req.Name, req.Payload, req.Coalesce)
	default:
		err = fmt.Errorf("this agent knows no request %q", req.Op)
	}
	if err != nil {
		ans.Error = err.Error()
	}
	return ans
}
