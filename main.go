// main.go: what a user types and sees: the commands with their options, help,
// output and errors, and the wiring of an agent.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

var version = "0.1.0" // the Makefile sets it

var prog = "hamlet" // the name that the program was called by

const (
	rpcPort      = "7373"
	defaultRPC   = "127.0.0.1:" + rpcPort
	keySize      = 32
	handlerGrace = 3 * time.Second // for handlers that run when the agent ends
	// One Ctrl-C arrives twice when a wrapper such as timeout or sudo passes it on.
	sameSignal = 200 * time.Millisecond
)

// failure is an error as a user reads it.
type failure struct {
	msg, hint string
	code      int  // exit status: 1, or 2 for wrong usage
	again     bool // the same may work a little later
}

func (f *failure) Error() string { return f.msg }

func fail(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 1}
}

func misuse(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 2}
}

func main() {
	prog = filepath.Base(os.Args[0])
	err := run(append(os.Args[1:], "")[0], os.Args[min(2, len(os.Args)):])
	if err == nil {
		return
	}
	f, ok := errors.AsType[*failure](err)
	if !ok {
		f = &failure{msg: err.Error(), code: 1}
	}
	fmt.Fprintf(os.Stderr, "%s: error: %s\n", prog, printable(f.msg, "\n\t"))
	if f.hint != "" {
		fmt.Fprintf(os.Stderr, "hint: %s\n", printable(f.hint, "\n\t"))
	}
	os.Exit(f.code)
}

func run(name string, args []string) error {
	switch name {
	case "help", "-h", "-help", "--help":
		return help(args)
	case "-v", "-version", "--version":
		name = "version"
	case "agent":
		if os.Getpid() == 1 {
			os.Exit(runAsInit())
		}
	}
	c, err := findCommand(name)
	if err != nil {
		return err
	}
	args, err = c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return help([]string{name})
	} else if err != nil {
		return err
	}
	if name != "agent" { // which has its own way with signals
		quit := make(chan os.Signal, 1)
		signal.Notify(quit, syscall.SIGQUIT) // Go would print stacks
		go func() { <-quit; os.Exit(128 + int(syscall.SIGQUIT)) }()
	}
	return c.run(args)
}

// ---- commands and options ----

// command is one command; its options and its run share variables.
type command struct {
	name, args, short string
	examples          string // {} stands for the program's name
	options           []option
	minArgs, maxArgs  int
	run               func(args []string) error
}

// option defines a flag and its lines in the help. Without a name, text heads
// the group of options that follows.
type option struct {
	name, arg, text string
	value           any      // *string, *int, *bool, *time.Duration or *[]string; holds the default
	env             []string // where the value is looked for if the flag is not given
}

// commands make one command each, with the defaults in its options.
var commands = []func() *command{
	agentCommand, membersCommand, joinCommand, leaveCommand, forceLeaveCommand, eventCommand, keygenCommand, versionCommand,
}

func findCommand(name string) (*command, error) {
	for _, newCommand := range commands {
		if c := newCommand(); c.name == name {
			return c, nil
		}
	}
	hint := fmt.Sprintf("'%s help' lists the commands; '%s agent' starts a node", prog, prog)
	if name == "" {
		return nil, misuse(hint, "no command given")
	}
	return nil, misuse(hint, "there is no command %q", name)
}

const topHelp = `  {} agent                     start a node on this machine
  {} agent -join 10.0.2.15     start one that joins the cluster of that host
  {} agent -log-level=debug -event-handler=./handler.sh
                                   run a script when members come and go
  {} members                   list the members of the cluster
  {} leave                     leave the cluster and stop the agent

Commands:
`

func help(args []string) error {
	text := topHelp
	if len(args) == 0 {
		for _, newCommand := range commands {
			c := newCommand()
			text += fmt.Sprintf("  %-12s %s\n", c.name, c.short)
		}
		text += "\n'{} help COMMAND' shows how to use a command, and its options.\n"
	} else {
		c, err := findCommand(args[0])
		if err != nil {
			return err
		}
		usage := c.name
		if len(c.options) > 0 {
			usage += " [OPTION...]"
		}
		text = c.examples + "\nUsage: {} " + strings.TrimSpace(usage+" "+c.args) + "\n"
		for _, o := range c.options {
			text += o.help()
		}
	}
	return output(strings.ReplaceAll(text, "{}", prog))
}

func (o option) help() string {
	if o.name == "" {
		return "\n" + o.text + ":\n"
	}
	const indent = "                        "
	left := strings.TrimRight("  -"+o.name+" "+o.arg, " ")
	if len(left) > len(indent)-2 {
		left += "\n" + indent
	}
	return fmt.Sprintf("%-*s%s\n", len(indent), left, strings.ReplaceAll(o.text, "\n", "\n"+indent))
}

// parse sets the options from args and the environment and returns the
// arguments that follow them.
func (c *command) parse(args []string) ([]string, error) {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	given := make(map[string]bool)
	for _, o := range c.options {
		take := func(s string) error { given[o.name] = true; return set(o.value, s) }
		if _, ok := o.value.(*bool); ok {
			fs.BoolFunc(o.name, "", take)
		} else if o.name != "" {
			fs.Func(o.name, "", take)
		}
	}
	err := fs.Parse(args)
	for _, o := range c.options {
		i := slices.IndexFunc(o.env, func(name string) bool { return os.Getenv(name) != "" })
		if i < 0 || given[o.name] || err != nil {
			continue
		}
		values := []string{os.Getenv(o.env[i])}
		if _, ok := o.value.(*[]string); ok {
			values = splitList(values[0])
		}
		for _, v := range values {
			if e := set(o.value, v); e != nil {
				err = fmt.Errorf("invalid value %q for %s: %w", v, o.env[i], e)
			}
		}
	}
	switch args = fs.Args(); {
	case errors.Is(err, flag.ErrHelp):
		return nil, err
	case err != nil:
	case len(args) < c.minArgs:
		err = fmt.Errorf("%s is missing", c.args)
	case len(args) > c.maxArgs:
		if _, e := parseKeys(args[c.maxArgs : c.maxArgs+1]); e == nil {
			args[c.maxArgs] = "(a key)" // which is never shown
		}
		err = fmt.Errorf("unexpected argument %q", args[c.maxArgs])
	default:
		return args, nil
	}
	return nil, misuse(fmt.Sprintf("'%s help %s' shows how to use it", prog, c.name), "%s: %v", c.name, err)
}

// set parses s into *value, or appends it to a list.
func set(value any, s string) (err error) {
	switch v := value.(type) {
	case *string:
		*v = s
	case *[]string:
		*v = append(*v, s)
	case *bool:
		if *v, err = strconv.ParseBool(s); err != nil {
			return errors.New("want true or false")
		}
	case *int:
		if *v, err = strconv.Atoi(s); err != nil || *v < 0 {
			return errors.New("want a number, 0 or more")
		}
	case *time.Duration:
		if *v, err = time.ParseDuration(s); err != nil || *v <= 0 {
			return errors.New("want a duration, such as 500ms, 20s or 10m")
		}
	}
	return nil
}

// splitList splits the value of an environment variable on commas, or on
// newlines if it holds any. The events in member-join,user:x=script stay with
// their script.
func splitList(s string) (items []string) {
	sep, events := ",", ""
	if strings.Contains(s, "\n") {
		sep = "\n"
	}
	for item := range strings.SplitSeq(s, sep) {
		item = strings.TrimSpace(item)
		if _, err := parseFilters(item); err == nil && !strings.Contains(item, "=") {
			events += item + ","
		} else if item != "" {
			items = append(items, events+item)
			events = ""
		}
	}
	if events != "" {
		items = append(items, strings.TrimSuffix(events, ","))
	}
	return items
}

// output writes to stdout; a full disk or a closed pipe is an error.
func output(text string) error {
	if _, err := os.Stdout.WriteString(text); err != nil {
		return fail("", "cannot write the output: %v", reason(err))
	}
	return nil
}

// printable makes text from elsewhere safe to show: whatever is not graphic
// (escape sequences, bidi marks, broken UTF-8) is shown as in Go source,
// except for the characters in keep.
func printable(s, keep string) string {
	var b strings.Builder
	for s != "" {
		r, n := utf8.DecodeRuneInString(s)
		if unicode.IsGraphic(r) && (r != utf8.RuneError || n > 1) || strings.Contains(keep, s[:n]) {
			b.WriteString(s[:n])
		} else {
			b.WriteString(strings.Trim(strconv.QuoteToASCII(s[:n]), `"`))
		}
		s = s[n:]
	}
	return b.String()
}

// reason strips what the net and os packages put in front of an error number.
func reason(err error) error {
	if no, ok := errors.AsType[syscall.Errno](err); ok {
		return no
	}
	return err
}

// ---- the commands that ask a running agent ----

// client is how a command reaches its agent.
type client struct{ addr, token string }

func (c *client) options() []option {
	c.addr = defaultRPC
	return []option{
		{text: "Reaching the agent"},
		{"rpc-addr", "ADDR", "where its RPC listens, or SERF_RPC_ADDR\n(default: " + defaultRPC + ")", &c.addr, []string{"SERF_RPC_ADDR", "HAMLET_RPC_ADDR"}},
		{"rpc-auth", "TOKEN", "the token that it asks for, or SERF_RPC_AUTH", &c.token, []string{"SERF_RPC_AUTH", "HAMLET_RPC_AUTH"}},
	}
}

func (c *client) call(req request, timeout time.Duration) (answer, error) {
	host, port, err := hostPort(c.addr, rpcPort)
	if err != nil {
		return answer{}, misuse("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	return callRPC(net.JoinHostPort(host, port), c.token, req, timeout)
}

// do makes a call and says that it is done; %d stands for the nodes joined.
func (c *client) do(req request, timeout time.Duration, done string) error {
	ans, err := c.call(req, timeout)
	if err != nil {
		return err
	}
	return output(strings.ReplaceAll(done, "%d", strconv.Itoa(ans.Joined)))
}

// query is what a user asks of the members.
type query struct {
	format, status, name string
	tags                 []string
	wait                 int
	timeout              time.Duration
}

func membersCommand() *command {
	var c client
	q := query{format: "text", status: ".*", name: ".*"}
	return &command{
		name: "members", short: "lists the members of the cluster",
		examples: `  {} members                                list all members
  {} members -status alive -tag role=web    the living ones with a tag
  {} members -name 'db[0-9]+' -format json
  {} members -wait 3 -timeout 20s           wait until three are alive
`,
		options: append([]option{
			{text: "What to list (RE: a regular expression that matches the whole)"},
			{"status", "RE", "alive, leaving, left, failed", &q.status, nil},
			{"name", "RE", "the member's name", &q.name, nil},
			{"tag", "KEY=RE", "a tag's value; repeatable", &q.tags, nil},
			{"format", "FORMAT", "text or json (default: text)", &q.format, nil},
			{text: "Waiting"},
			{"wait", "N", "wait until N of those listed are alive, even for the\nagent to start; exit status 1 if it took too long", &q.wait, nil},
			{"timeout", "DURATION", "how long to wait (default: for ever)", &q.timeout, nil},
		}, c.options()...),
		run: func([]string) error { return q.run(&c) },
	}
}

// conditions are what a member must fulfil to be listed.
func (q *query) conditions() (conds []func(Member) bool, err error) {
	add := func(option, re string, field func(Member) (string, bool)) {
		r, rerr := regexp.Compile("^(?s:" + re + ")$")
		if rerr != nil {
			err = misuse("", "%s: %q is not a regular expression: %v", option, re, rerr)
		}
		conds = append(conds, func(m Member) bool { v, ok := field(m); return ok && r.MatchString(v) })
	}
	add("-status", q.status, func(m Member) (string, bool) { return m.Status.String(), true })
	add("-name", q.name, func(m Member) (string, bool) { return m.Name, true })
	for _, t := range q.tags {
		key, re, ok := strings.Cut(t, "=")
		if !ok {
			return nil, misuse("for example: -tag role=web", "-tag takes KEY=RE, not %q", t)
		}
		add("-tag", re, func(m Member) (string, bool) { v, ok := m.Tags.Map()[key]; return v, ok })
	}
	return conds, err
}

func (q *query) run(c *client) error {
	show := map[string]func([]Member) string{"text": membersText, "json": membersJSON}[q.format]
	if show == nil {
		return misuse("", "-format is text or json, not %q", q.format)
	}
	if q.timeout > 0 && q.wait == 0 {
		return misuse("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
	}
	conds, err := q.conditions()
	if err != nil {
		return err
	}
	if q.wait > 0 && !conds[0](Member{Status: StatusAlive}) {
		return misuse("", "-wait counts the living, and -status %q leaves them out", q.status)
	}
	const pause = 100 * time.Millisecond
	alive, answered := 0, false
	for start := time.Now(); ; time.Sleep(pause) {
		patience := time.Duration(rpcTimeout)
		if q.timeout > 0 {
			patience = min(patience, max(q.timeout-time.Since(start), pause))
		}
		ans, err := c.call(request{Op: "members"}, patience)
		if err == nil {
			list := slices.DeleteFunc(ans.Members, func(m Member) bool {
				return slices.ContainsFunc(conds, func(cond func(Member) bool) bool { return !cond(m) })
			})
			alive, answered = 0, true
			for _, m := range list {
				if m.Status == StatusAlive {
					alive++
				}
			}
			if alive >= q.wait {
				return output(show(list))
			}
		}
		f, ok := errors.AsType[*failure](err)
		late := q.timeout > 0 && time.Since(start)+pause >= q.timeout
		switch {
		case late && answered:
			return fail("", "%d of %d members alive after %v", alive, q.wait, q.timeout)
		case err != nil && (q.wait == 0 || late || !ok || !f.again):
			return err
		}
	}
}

// membersText makes columns at least four blanks apart. The third is never
// narrower than "failed", so that tags stay in place when a member fails.
func membersText(ms []Member) string {
	var rows [][4]string
	width := [4]int{0, 0, len("failed"), 0}
	for _, m := range ms {
		row := [4]string{printable(m.Name, ""), m.Addr.String(), m.Status.String(), printable(strings.Join(m.Tags.Pairs(), ","), "")}
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
		rows = append(rows, row)
	}
	var b strings.Builder
	for _, r := range rows {
		line := fmt.Sprintf("%-*s    %-*s    %-*s    %s", width[0], r[0], width[1], r[1], width[2], r[2], r[3])
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

// membersJSON lays JSON out as Serf does. Not with encoding/json: that leaves
// DEL and the C1 controls as they are, and a terminal would obey them.
func membersJSON(ms []Member) string {
	var list []string
	for _, m := range ms {
		var tags []string
		for _, p := range m.Tags.Pairs() {
			k, v, _ := strings.Cut(p, "=")
			tags = append(tags, jsonString(k)+": "+jsonString(v))
		}
		list = append(list, jsonBlock("{}", "    ", []string{
			`"name": ` + jsonString(m.Name),
			`"addr": ` + jsonString(m.Addr.String()),
			`"port": ` + strconv.Itoa(int(m.Addr.Port())),
			`"tags": ` + jsonBlock("{}", "      ", tags),
			`"status": ` + jsonString(m.Status.String()),
		}))
	}
	return jsonBlock("{}", "", []string{`"members": ` + jsonBlock("[]", "  ", list)}) + "\n"
}

func jsonBlock(brackets, indent string, items []string) string {
	if len(items) == 0 {
		return brackets
	}
	return brackets[:1] + "\n  " + indent + strings.Join(items, ",\n  "+indent) + "\n" + indent + brackets[1:]
}

func jsonString(s string) string {
	q := []byte{'"'}
	for _, r := range s { // broken UTF-8 becomes U+FFFD
		switch {
		case r == '"' || r == '\\':
			q = append(q, '\\', byte(r))
		case unicode.IsGraphic(r):
			q = utf8.AppendRune(q, r)
		default:
			for _, u := range utf16.AppendRune(nil, r) {
				q = fmt.Appendf(q, `\u%04x`, u)
			}
		}
	}
	return string(append(q, '"'))
}

func joinCommand() *command {
	var c client
	return &command{
		name: "join", args: "ADDR...", short: "makes the agent join the cluster of another node",
		examples: "  {} join 10.0.2.15\n  {} join 10.0.2.15:7946 node2.example.com '[2001:db8::7]:7946'\n",
		options:  c.options(), minArgs: 1, maxArgs: 1000,
		run: func(addrs []string) error {
			if err := checkAddrs("join", addrs); err != nil {
				return err
			}
			return c.do(request{Op: "join", Addrs: strings.Join(addrs, " ")}, slowRPCTimeout, "Successfully joined cluster by contacting %d nodes.\n")
		},
	}
}

func leaveCommand() *command {
	var c client
	return &command{
		name: "leave", short: "makes the agent leave the cluster and stop",
		examples: "  {} leave\n", options: c.options(),
		run: func([]string) error { return c.do(request{Op: "leave"}, slowRPCTimeout, "Graceful leave complete\n") },
	}
}

func forceLeaveCommand() *command {
	var c client
	var prune bool
	return &command{
		name: "force-leave", args: "NAME", short: "turns a failed member into one that left",
		examples: "  {} force-leave web3           a failed member counts as left, everywhere\n" +
			"  {} force-leave -prune web3    it vanishes from the list\n",
		options: append([]option{{text: "Options"}, {"prune", "", "forget the member altogether", &prune, nil}}, c.options()...),
		minArgs: 1, maxArgs: 1,
		run: func(args []string) error {
			return c.do(request{Op: "force-leave", Name: args[0], Prune: prune}, rpcTimeout, "")
		},
	}
}

func eventCommand() *command {
	var c client
	coalesce := true
	return &command{
		name: "event", args: "NAME [PAYLOAD]", short: "sends a user event to the handlers of every member",
		examples: "  {} event deploy\n  {} event deploy 3f2c1aa       with a payload, the handlers' input\n" +
			"  {} event -coalesce=false log \"$(uptime)\"\n",
		options: append([]option{{text: "Options"}, {"coalesce", "", "of events of one name that wait for a handler, only the\n" +
			"last is run (default: true)", &coalesce, nil}}, c.options()...),
		minArgs: 1, maxArgs: 2,
		run: func(args []string) error {
			name, payload := args[0], strings.Join(args[1:], "")
			if n := len(name) + len(payload); name == "" || n > maxEvent {
				return fail("", "an event's name takes at least a byte, its name and payload at most %d; these take %d and %d", maxEvent, len(name), len(payload))
			}
			return c.do(request{Op: "event", Name: name, Payload: []byte(payload), Coalesce: coalesce}, rpcTimeout,
				fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(name, ""), coalesce))
		},
	}
}

func keygenCommand() *command {
	return &command{
		name: "keygen", short: "prints a new key for -encrypt",
		examples: "  {} keygen\n  HAMLET_ENCRYPT=$({} keygen) {} agent\n",
		run: func([]string) error {
			key := make([]byte, keySize)
			rand.Read(key) // never fails
			return output(base64.StdEncoding.EncodeToString(key) + "\n")
		},
	}
}

func versionCommand() *command {
	return &command{
		name: "version", short: "prints the version", examples: "  {} version\n",
		run: func([]string) error {
			return output(fmt.Sprintf("hamlet %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH))
		},
	}
}

// ---- the agent ----

// agentOptions are the options of the agent; those that need checking as the
// user wrote them.
type agentOptions struct {
	gossip                                                   GossipConfig
	handlers                                                 HandlerConfig
	bind, advertise, iface, rpcAddr, rpcAuth, role, logLevel string
	tags, keys                                               []string
	leaveOnTerminate                                         bool
}

func agentCommand() *command {
	a := &agentOptions{
		gossip:   GossipConfig{ReapAfter: 24 * time.Hour},
		handlers: HandlerConfig{Timeout: 10 * time.Minute, Grace: handlerGrace},
		bind:     "0.0.0.0:7946", rpcAddr: defaultRPC, logLevel: "info",
	}
	c := &command{
		name: "agent", short: "runs a node until it is told to stop",
		examples: `  {} agent
  {} agent -join 10.0.2.15
  {} agent -node web1 -role web -join seed1.example.com -join seed2
  {} agent -log-level=debug -event-handler=./handler.sh
  {} agent -event-handler 'member-join,member-leave,member-failed=./lb.sh'
  HAMLET_JOIN=seed1,seed2 HAMLET_TAG=role=web,zone=b {} agent

Every option can also be set in the environment: -log-level as HAMLET_LOG_LEVEL.
Lists are split on commas, or on newlines if there are any. A flag wins.

SIGINT (Ctrl-C) leaves the cluster gracefully. SIGTERM ends at once, so that the
others see this node fail. A second signal ends at once, with exit status 1.
SIGHUP does nothing.
`,
		options: []option{
			{text: "The node"},
			{"node", "NAME", "its name, unique in the cluster (default: the host name)", &a.gossip.Name, nil},
			{"role", "ROLE", "the same as -tag role=ROLE", &a.role, nil},
			{"tag", "KEY=VALUE", "a tag that others see; repeatable", &a.tags, nil},
			{text: "Addresses"},
			{"bind", "IP:PORT", "where to listen for gossip, UDP and TCP\n(default: 0.0.0.0:7946)", &a.bind, nil},
			{"advertise", "HOST[:PORT]", "the address that others are told (default: the address\nfrom which packets to the first seed go out)", &a.advertise, nil},
			{"iface", "NAME", "advertise the address of this network interface", &a.iface, nil},
			{"rpc-addr", "HOST:PORT", "where to listen for the other commands\n(default: " + defaultRPC + ")", &a.rpcAddr, nil},
			{"rpc-auth", "TOKEN", "a token that the other commands must give", &a.rpcAuth, nil},
			{text: "The cluster"},
			{"join", "HOST[:PORT]", "a node to join, tried until it answers; repeatable", &a.gossip.Seeds, nil},
			{"retry-max", "N", "give up after N rounds of trying (default: never)", &a.gossip.RetryMax, nil},
			{"cluster", "NAME", "nodes with another cluster name are not let in", &a.gossip.Cluster, nil},
			{"encrypt", "KEY", "a key from '{} keygen': only nodes with the key can\nread or join. Repeatable: the first seals, all can open.\nOther users can see arguments: better set HAMLET_ENCRYPT", &a.keys, nil},
			{"reap-after", "DURATION", "when failed and left members are forgotten\n(default: 24h)", &a.gossip.ReapAfter, nil},
			{"leave-on-terminate", "", "leave gracefully at SIGTERM, too", &a.leaveOnTerminate, nil},
			{text: "Handlers"},
			{"event-handler", "SPEC", "a script to run on events; repeatable. SPEC is SCRIPT or\nEVENT[,EVENT...]=SCRIPT; an EVENT is member-join,\nmember-leave, member-failed, member-update, member-reap,\nuser, user:NAME or * (all of them)", &a.handlers.Specs, nil},
			{"handler-timeout", "DURATION", "when a script is stopped (default: 10m)", &a.handlers.Timeout, nil},
			{text: "Log"},
			{"log-level", "LEVEL", "trace, debug, info, warn or err (default: info)", &a.logLevel, nil},
		},
		run: func([]string) error { return a.run() },
	}
	for i, o := range c.options {
		c.options[i].env = []string{"HAMLET_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))}
	}
	return c
}

// check fills the gossip configuration from what the user wrote and returns
// the reason for the advertised address.
func (a *agentOptions) check() (why string, err error) {
	cfg := &a.gossip
	if cfg.Name == "" {
		cfg.Name, _ = os.Hostname()
	}
	if err := validName(cfg.Name); err != nil {
		return "", misuse("choose a name with -node", "%v", err)
	}
	if err := checkAddrs("-join", cfg.Seeds); err != nil {
		return "", err
	}
	tags := make(map[string]string)
	for _, t := range a.tags {
		k, v, ok := strings.Cut(t, "=")
		if !ok {
			return "", misuse("for example: -tag role=web", "-tag takes KEY=VALUE, not %q", t)
		}
		tags[k] = v
	}
	if a.role != "" {
		if old, ok := tags["role"]; ok && old != a.role {
			return "", misuse("give one of them", "-role %q and -tag role=%q differ", a.role, old)
		}
		tags["role"] = a.role
	}
	if cfg.Tags, err = MakeTags(tags); err != nil {
		return "", misuse("", "-tag: %v", err)
	}
	if cfg.Keys, err = parseKeys(a.keys); err != nil {
		return "", misuse(fmt.Sprintf("'%s keygen' makes a key", prog), "-encrypt: %v", err)
	}
	if cfg.Bind, err = parseBind(a.bind); err != nil {
		return "", misuse("-bind takes IP:PORT, such as 0.0.0.0:7946 or [::1]:7946", "-bind: %v", err)
	}
	cfg.Moves = cfg.Bind.Addr().IsUnspecified() && a.advertise == "" && a.iface == ""
	cfg.Advertise, why, err = a.advertised()
	return why, err
}

// parseKeys decodes the keys. Its errors never show a key.
func parseKeys(list []string) (keys [][]byte, err error) {
	for i, s := range list {
		key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("key %d of %d is not base64", i+1, len(list))
		}
		if len(key) != keySize {
			return nil, fmt.Errorf("key %d of %d has %d bytes, a key has %d", i+1, len(list), len(key), keySize)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func (a *agentOptions) run() error {
	os.Unsetenv("HAMLET_ENCRYPT") // handlers have no use for it
	runtime.GOMAXPROCS(1)         // an agent mostly sleeps: a second processor costs a third more to wake up
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(48 << 20) // soft: the garbage of a flood is collected earlier
	}
	level := slices.Index(logLevels, strings.ToLower(a.logLevel))
	if level < 0 {
		return misuse("", "-log-level: %q is none of %s", a.logLevel, strings.Join(logLevels, ", "))
	}
	logs := newLogWriter(level)
	defer logs.flush()
	logger := log.New(logs, "", log.LstdFlags)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // signal.Ignore would be inherited by handlers

	why, err := a.check()
	if err != nil {
		return err
	}
	ln, err := listenRPC(a.rpcAddr)
	if err != nil {
		return err
	}
	defer ln.Close()
	var g *Gossip
	started := make(chan struct{}) // g is there
	a.handlers.Log = logger
	a.handlers.Env = func() []string { <-started; return handlerEnv(g.Self(), loopbackFor(ln.Addr()), a.rpcAuth) }
	handlers, err := NewHandlers(a.handlers)
	if err != nil {
		return misuse(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.Log, a.gossip.Events = logger, handlers.Deliver
	if g, err = StartGossip(a.gossip); err != nil {
		return startFailure("gossip", "-bind", a.gossip.Bind.String(), err)
	}
	close(started)
	a.banner(g.Self(), why, ln.Addr(), logger)
	logs.start()
	return a.wait(g, serveRPC(ln, g, a.rpcAuth, logger), handlers, signals, logger)
}

func listenRPC(addr string) (net.Listener, error) {
	host, port, err := hostPort(addr, rpcPort)
	if err != nil {
		return nil, misuse("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	network := "tcp"
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		network = "tcp4" // or 0.0.0.0 would take IPv6 as well
	}
	ln, err := net.Listen(network, net.JoinHostPort(host, port))
	if err != nil {
		return nil, startFailure("the RPC", "-rpc-addr", net.JoinHostPort(host, port), err)
	}
	return ln, nil
}

// banner tells how the agent can be reached, and warns of what is hardly meant.
func (a *agentOptions) banner(self Member, why string, rpc net.Addr, logger *log.Logger) {
	bind := a.gossip.Bind
	if bind.Port() == 0 {
		bind = netip.AddrPortFrom(bind.Addr(), self.Addr.Port())
	}
	fmt.Printf("==> Starting hamlet agent...\n==> Starting hamlet agent RPC...\n==> hamlet agent running!\n"+
		"    Node name: '%s'\n    Bind addr: '%s'\n    Advertise: '%s' (%s)\n     RPC addr: '%s'\n",
		self.Name, bind, self.Addr, why, rpc)
	if a.rpcAuth == "" && !rpc.(*net.TCPAddr).IP.IsLoopback() {
		logger.Printf("[WARN] the RPC listens on %s without a token: whoever reaches it controls this agent (-rpc-auth sets one)", rpc)
	}
	if why == noAddress {
		logger.Printf("[WARN] advertising %s, which other machines cannot reach: %s (-advertise sets one)", self.Addr, why)
	}
}

// wait returns when the agent has ended: told by a signal, by the leave
// command, or by itself.
func (a *agentOptions) wait(g *Gossip, rpc *rpcServer, handlers *Handlers, signals <-chan os.Signal, logger *log.Logger) error {
	ended := make(chan struct{})
	go func() { <-g.Done(); rpc.Close(); handlers.Close(); close(ended) }()
	var told time.Time // to stop
	for {
		var s os.Signal
		select {
		case <-ended:
			return g.Err()
		case s = <-signals:
		}
		switch {
		case s == syscall.SIGHUP: // Serf would read its configuration again
			logger.Printf("[INFO] hangup: there is no configuration to reload, carrying on")
		case time.Since(told) < sameSignal:
		case !told.IsZero():
			return fail("", "%v while stopping: ended at once", s)
		case s == os.Interrupt || s == syscall.SIGTERM && a.leaveOnTerminate:
			told = time.Now()
			logger.Printf("[INFO] %v: leaving the cluster, a second signal ends at once", s)
			go func() {
				if err := g.Leave(); err != nil {
					logger.Printf("[WARN] leave: %v", err)
				}
			}()
		default: // peers notice at once; handlers get their grace
			told = time.Now()
			logger.Printf("[INFO] %v: ending without leaving", s)
			g.Close()
		}
	}
}

// startFailure explains why a port could not be opened.
func startFailure(what, option, addr string, err error) error {
	no, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return fail("", "cannot start %s at %s: %v", what, addr, err)
	}
	hint := map[syscall.Errno]string{
		syscall.EADDRINUSE:    "is an agent running there already? choose another address with " + option,
		syscall.EADDRNOTAVAIL: "this machine has no such address; choose another with " + option,
		syscall.EACCES:        "ports below 1024 need root; choose another with " + option,
	}[no]
	return fail(hint, "cannot listen on %s for %s: %v", addr, what, no)
}

// ---- addresses ----

func checkAddrs(what string, addrs []string) error {
	for _, s := range addrs {
		if host, port, err := hostPort(s, defaultPort); err != nil || host == "" || port == "0" {
			return misuse("an address is HOST or HOST:PORT, such as 10.0.2.15:7946 or [2001:db8::7]:7946", "%s: %q is not an address", what, s)
		}
	}
	return nil
}

func parseBind(s string) (netip.AddrPort, error) {
	host, port, err := hostPort(s, defaultPort)
	if err != nil {
		return netip.AddrPort{}, err
	}
	bind, err := netip.ParseAddrPort(net.JoinHostPort(cmp.Or(host, "0.0.0.0"), port))
	if err != nil || bind.Addr().IsMulticast() {
		return bind, fmt.Errorf("%q is not an IP address and a port", s)
	}
	return netip.AddrPortFrom(bind.Addr().Unmap(), bind.Port()), nil
}

// loopbackFor returns an address at which this machine reaches a listener.
func loopbackFor(a net.Addr) string {
	if tcp := a.(*net.TCPAddr); tcp.IP.IsUnspecified() {
		return fmt.Sprintf("127.0.0.1:%d", tcp.Port)
	}
	return a.String()
}

// advertised returns the address that others are told, and the reason.
func (a *agentOptions) advertised() (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.Bind
	const hint = "-advertise takes HOST or HOST:PORT, -iface the name of an interface"
	switch {
	case a.advertise != "" && a.iface != "":
		return addr, "", misuse("give one of them", "-advertise %s and -iface %s", a.advertise, a.iface)
	case a.advertise != "":
		found, err := resolveOne(context.Background(), a.advertise, strconv.Itoa(int(bind.Port())))
		for _, ap := range found {
			if ip := ap.Addr(); !ip.IsUnspecified() && !ip.IsMulticast() && fits(ip, bind.Addr()) {
				return ap, "set with -advertise", nil
			}
		}
		err = cmp.Or(err, fmt.Errorf("no address at which others could reach %s", bind))
		return addr, "", misuse(hint, "-advertise %q: %v", a.advertise, err)
	case a.iface != "":
		ifc, err := net.InterfaceByName(a.iface)
		if err != nil {
			return addr, "", misuse(hint, "-iface: there is no interface %q", a.iface)
		}
		ip := ifaceAddr(ifc, bind.Addr())
		if !ip.IsValid() {
			return addr, "", misuse(hint, "-iface: %q has no address at which others could reach %s", a.iface, bind)
		}
		return netip.AddrPortFrom(ip, bind.Port()), "address of " + a.iface, nil
	}
	addr, why = chooseAdvertise(bind, a.gossip.Seeds)
	return addr, why, nil
}

const noAddress = "no other address was found"

// chooseAdvertise picks the address by which others most likely reach an agent
// that listens at bind, and says why. It is never a wildcard, and loopback only
// if bind is or if there is nothing else.
func chooseAdvertise(bind netip.AddrPort, seeds []string) (netip.AddrPort, string) {
	at := func(ip netip.Addr) netip.AddrPort { return netip.AddrPortFrom(ip, bind.Port()) }
	if !bind.Addr().IsUnspecified() {
		return bind, "the bound address"
	}
	found, _ := resolve(context.Background(), seeds)
	for _, seed := range found {
		if src := sourceTo(seed.Addr()); usable(src, bind.Addr()) {
			return at(src), fmt.Sprintf("source address of the route to %s", seed.Addr())
		}
	}
	for _, far := range []string{"198.51.100.1", "2001:db8::1"} { // reserved for documentation, so never near
		if src := sourceTo(netip.MustParseAddr(far)); usable(src, bind.Addr()) {
			return at(src), "source address of the default route"
		}
	}
	ifcs, _ := net.Interfaces()
	for _, ifc := range ifcs {
		if ip := ifaceAddr(&ifc, bind.Addr()); ip.IsValid() && ifc.Flags&net.FlagUp != 0 {
			return at(ip), "address of " + ifc.Name
		}
	}
	if bind.Addr().Is4() {
		return at(netip.MustParseAddr("127.0.0.1")), noAddress
	}
	return at(netip.IPv6Loopback()), noAddress
}

// sourceTo asks the kernel where packets to ip would come from. Nothing is sent.
func sourceTo(ip netip.Addr) netip.Addr {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 9)))
	if err != nil {
		return netip.Addr{}
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}

func ifaceAddr(ifc *net.Interface, bind netip.Addr) netip.Addr {
	addrs, _ := ifc.Addrs()
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && usable(p.Addr().Unmap(), bind) {
			return p.Addr().Unmap()
		}
	}
	return netip.Addr{}
}

// ---- the log ----

var logLevels = []string{"trace", "debug", "info", "warn", "err"}

// logWriter writes log lines of a level and above. It never blocks: a terminal
// that was halted must not halt the agent. Until start, lines wait.
type logWriter struct {
	level int
	lines chan string // "" is the end
	lost  atomic.Int64
	start func()
	done  chan struct{}
}

func newLogWriter(level int) *logWriter {
	w := &logWriter{level: level, lines: make(chan string, 1024), done: make(chan struct{})}
	w.start = sync.OnceFunc(func() { go w.pump() })
	return w
}

// Write takes one line as log.Logger writes it, "2013/12/08 07:56:48 [INFO] ...".
func (w *logWriter) Write(p []byte) (int, error) {
	line := string(p)
	if rest, ok := strings.CutPrefix(line[min(len(line), len("2013/12/08 07:56:48 ")):], "["); ok {
		word, _, _ := strings.Cut(rest, "]")
		if l := slices.Index(logLevels, strings.ToLower(word)); l >= 0 && l < w.level {
			return len(p), nil
		}
	}
	select {
	case w.lines <- printable(line, "\n\t"):
	default:
		w.lost.Add(1)
	}
	return len(p), nil
}

func (w *logWriter) pump() {
	defer close(w.done)
	for line := <-w.lines; line != ""; line = <-w.lines {
		os.Stderr.WriteString(line)
		if n := w.lost.Swap(0); n > 0 {
			log.Printf("[WARN] %d log lines were lost here: nobody took them in time", n)
		}
	}
}

// flush writes what is left, for two seconds at most.
func (w *logWriter) flush() {
	w.start()
	waitAtMost(2*time.Second, func() { w.lines <- ""; <-w.done })
}
