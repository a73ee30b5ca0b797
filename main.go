// main.go: what a user types and sees: the commands with their options, help,
// output and errors, addresses, the log, and the wiring of an agent.

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
	"regexp/syntax"
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
	defaultPort    = "7946"
	defaultRPCPort = "7373"
	defaultRPC     = "127.0.0.1:" + defaultRPCPort
	keySize        = 32
	rpcTimeout     = 5 * time.Second
	slowTimeout    = 10 * time.Second // a join or a leave takes the agent itself up to five
	resolveFor     = 1500 * ms
	handlerGrace   = 3 * time.Second // for handlers that run when the agent ends
	// One Ctrl-C arrives twice when a wrapper such as timeout or sudo passes it on.
	sameSignal = 200 * ms
)

// failure is an error as a user reads it.
type failure struct {
	msg, hint string
	code      int  // exit status: 1, or 2 for wrong usage
	again     bool // the same may work a little later
}

func (f *failure) Error() string { return f.msg }

// trouble is a failure of what was asked for, misuse one of how.
func trouble(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 1}
}

func misuse(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 2}
}

func main() {
	prog = filepath.Base(os.Args[0])
	if err := execute(append(os.Args[1:], "")[0], os.Args[min(2, len(os.Args)):]); err != nil {
		exit(err)
	}
}

// exit tells err, and ends the program.
func exit(err error) {
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

func execute(name string, args []string) error {
	switch name {
	case "":
		return cmp.Or(help(nil), misuse("", "no command given"))
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
	if args, err = c.parse(args); errors.Is(err, flag.ErrHelp) {
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
// the group of options that follows; without a text it is one of Serf's that is
// taken in silence.
type option struct {
	name, arg, text string
	value           any      // *string, *int, *bool, *time.Duration or *[]string; holds the default
	env             []string // where the value is looked for if the flag is not given
}

// newCommands makes all commands, with the defaults in their options.
func newCommands() []*command {
	c := &client{addr: defaultRPC}
	return append(append([]*command{agentCommand()}, c.looks()...), c.acts()...)
}

// serfWords is what to do instead of what Serf has and hamlet has not.
var serfWords = map[string]string{
	"-snapshot -rejoin":        "nothing is kept on disk: a restarted agent finds its cluster by -join, or is found",
	"-config-file -config-dir": "options come from flags or from HAMLET_ variables, such as HAMLET_JOIN",
	"-profile":                 "there is one timing, for LAN and WAN alike",
	"-discover -mdns-iface":    "name the seeds with -join; a DNS name with many addresses will do",
	"-keyring-file":            "give each key with -encrypt or HAMLET_ENCRYPT: the first seals, any opens",
	"-tags-file":               "give tags with -tag or HAMLET_TAG, and change them with the tags command",
	"-syslog":                  "the log goes to stderr: let systemd or 'logger' take it",
	"-protocol":                "there is one version: run the same hamlet everywhere",
	"-broadcast-timeout":       "nothing waits for a broadcast",
	"-relay-factor":            "an answer is sent again until it arrives",
	"keys":                     "restart the agents one by one with -encrypt OLD,NEW, then NEW,OLD, then NEW",
	"reachability":             "every member is looked at all the time: see 'members' and 'info'",
	"rtt":                      "there are no network coordinates: use ping",
	"monitor":                  "'watch' streams events, and the log is the agent's stderr",
}

// serfWord is the error for a word of Serf's; nil: it is none.
func serfWord(word string) error {
	for words, advice := range serfWords {
		if word != "" && slices.Contains(strings.Fields(words), word) {
			return misuse("", "%s has no %s: %s", prog, word, advice)
		}
	}
	return nil
}

func findCommand(name string) (*command, error) {
	for _, c := range newCommands() {
		if c.name == name {
			return c, nil
		}
	}
	hint := fmt.Sprintf("'%s help' lists the commands; '%s agent' starts a node", prog, prog)
	return nil, cmp.Or(serfWord(name), misuse(hint, "there is no command %q", name))
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
	if len(args) == 0 || args[0] == "help" {
		for _, c := range newCommands() {
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
	const indent = "                        "
	left := strings.TrimRight("  -"+o.name+" "+o.arg, " ")
	switch {
	case o.text == "":
		return ""
	case o.name == "":
		return "\n" + o.text + ":\n"
	case len(left) > len(indent)-2:
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
		if o.name != "" {
			fs.Var(flagValue{o.value}, o.name, "")
		}
	}
	err := fs.Parse(args)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, o := range c.options {
		if i := slices.IndexFunc(o.env, func(name string) bool { return os.Getenv(name) != "" }); i >= 0 && !given[o.name] && err == nil {
			err = o.fromEnv(o.env[i])
		}
	}
	args = fs.Args()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return nil, err
	case err != nil:
		if _, name, _ := strings.Cut(err.Error(), "not defined: "); serfWord(name) != nil {
			return nil, serfWord(name)
		}
	case len(args) < c.minArgs:
		err = fmt.Errorf("%s is missing", c.args)
	case len(args) > c.maxArgs:
		if _, e := parseKeys(args[c.maxArgs : c.maxArgs+1]); e == nil {
			args[c.maxArgs] = "(a key)" // which is never shown
		}
		err = fmt.Errorf("unexpected argument %q", args[c.maxArgs])
	}
	for _, arg := range args {
		if name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "="); strings.HasPrefix(arg, "-") && fs.Lookup(name) != nil && err == nil {
			err = fmt.Errorf("%s stands behind the arguments: options come before the name", arg)
		}
	}
	if err != nil {
		return nil, misuse(fmt.Sprintf("'%s help %s' shows how to use it", prog, c.name), "%s: %v", c.name, err)
	}
	return args, nil
}

// fromEnv sets the option from a variable. Lists are split on commas, or on
// newlines if there are any; the events in member-join,user:x=script stay with
// their script.
func (o option) fromEnv(name string) error {
	text, sep, events := os.Getenv(name), ",", ""
	list, isList := o.value.(*[]string)
	if strings.Contains(text, "\n") {
		sep = "\n"
	}
	if !isList {
		if err := (flagValue{o.value}).Set(text); err != nil {
			return fmt.Errorf("invalid value %q for %s: %w", text, name, err)
		}
		return nil
	}
	for item := range strings.SplitSeq(text, sep) {
		item = strings.TrimSpace(item)
		if strings.Count(item, `"`)%2+strings.Count(item, "'")%2 > 0 && sep == "," || o.name == "tag" && item != "" && !strings.Contains(item, "=") {
			return fmt.Errorf("%s is split at its commas, and %q is a part of it: end it with a newline to have it split at newlines only", name, item)
		}
		if checkEvents([]string{item}) == nil && !strings.Contains(item, "=") {
			events += item + ","
		} else if item != "" {
			*list, events = append(*list, events+item), ""
		}
	}
	if events != "" {
		*list = append(*list, strings.TrimSuffix(events, ","))
	}
	return nil
}

// flagValue is a flag.Value that sets what at points to, or appends to a list.
type flagValue struct{ at any }

func (f flagValue) String() string   { return "" }
func (f flagValue) IsBoolFlag() bool { _, ok := f.at.(*bool); return ok }

func (f flagValue) Set(s string) (err error) {
	want := ""
	switch v := f.at.(type) {
	case *string:
		*v = s
	case *[]string:
		*v = append(*v, s)
	case *bool:
		*v, err = strconv.ParseBool(s)
		want = "true or false"
	case *int:
		n, e := strconv.ParseUint(s, 10, 31)
		*v, err, want = int(n), e, "a number, 0 or more"
	case *time.Duration:
		if *v, err = time.ParseDuration(s); *v <= 0 {
			err = cmp.Or(err, errors.ErrUnsupported)
		}
		want = "a duration, such as 500ms, 20s or 10m"
	}
	if err != nil {
		return errors.New("want " + want)
	}
	return nil
}

// output writes to stdout; a full disk or a closed pipe is an error.
func output(text string) error {
	if _, err := os.Stdout.WriteString(text); err != nil {
		return trouble("", "cannot write the output: %v", reason(err))
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

// pairs is a JSON object: key, value, key, value.
type pairs []any

// toJSON lays v out as Serf does, indented, or (indent "-") in one line. Not with
// encoding/json: that leaves DEL and the C1 controls as they are, and a terminal
// would obey them.
func toJSON(v any, indent string) string {
	inner := indent + "  "
	if indent == "-" {
		inner = indent
	}
	var items []string
	brackets := "[]"
	switch v := v.(type) {
	case string:
		return jsonString(v)
	case []any:
		for _, x := range v {
			items = append(items, toJSON(x, inner))
		}
	case pairs:
		brackets = "{}"
		for i := 0; i < len(v); i += 2 {
			items = append(items, jsonString(v[i].(string))+": "+toJSON(v[i+1], inner))
		}
	default:
		return fmt.Sprint(v)
	}
	switch {
	case len(items) == 0:
		return brackets
	case indent == "-":
		return brackets[:1] + strings.Join(items, ", ") + brackets[1:]
	}
	return brackets[:1] + "\n" + inner + strings.Join(items, ",\n"+inner) + "\n" + indent + brackets[1:]
}

func jsonString(s string) string {
	q := []byte{'"'}
	for _, r := range s { // broken UTF-8 becomes U+FFFD
		switch {
		case r == '"' || r == '\\':
			q = append(q, '\\', byte(r))
		case r == '\n':
			q = append(q, `\n`...)
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

// with puts the options that reach the agent behind others.
func (c *client) with(options ...option) []option {
	return append(options,
		option{text: "Reaching the agent"},
		option{"rpc-addr", "ADDR", "where its RPC listens, or SERF_RPC_ADDR\n(default: " + defaultRPC + ")", &c.addr, []string{"SERF_RPC_ADDR", "HAMLET_RPC_ADDR"}},
		option{"rpc-auth", "TOKEN", "the token that it asks for, or SERF_RPC_AUTH", &c.token, []string{"SERF_RPC_AUTH", "HAMLET_RPC_AUTH"}})
}

func (c *client) call(req request, timeout time.Duration, each func(answer, []update) error) error {
	host, port, err := hostPort(c.addr, defaultRPCPort)
	if err != nil {
		return misuse("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	return callRPC(net.JoinHostPort(host, port), c.token, req, timeout, each)
}

// do makes a call and says that it is done; %d stands for the nodes joined.
func (c *client) do(req request, timeout time.Duration, done string) error {
	return c.call(req, timeout, func(a answer, _ []update) error {
		return output(strings.ReplaceAll(done, "%d", strconv.Itoa(a.Count)))
	})
}

// members asks for all members.
func (c *client) members(timeout time.Duration) (ms []Member, err error) {
	err = c.call(request{Op: "members"}, timeout, func(_ answer, us []update) error {
		for _, u := range us {
			ms = append(ms, u.Member)
		}
		return nil
	})
	return ms, err
}

// looks are the commands that show something.
func (c *client) looks() []*command {
	l, w, q := &listing{format: "text"}, &watching{format: "text", event: "*"}, &asking{format: "text", timeout: 15 * time.Second}
	format := option{"format", "FORMAT", "text or json (default: text)", nil, nil}
	in := func(value *string) option { o := format; o.value = value; return o }
	infoFormat := "text"
	return []*command{
		{name: "members", short: "lists the members of the cluster",
			examples: `  {} members                                list all members
  {} members -status alive -tag role=web    the living ones with a tag
  {} members -name 'db[0-9]+' -format json
  {} members -wait 3 -timeout 20s           wait until three are alive
`,
			options: c.with(option{text: "What to list (RE: a regular expression that matches the whole)"},
				option{"status", "RE", "alive, leaving, left, failed", &l.status, nil},
				option{"name", "RE", "the member's name", &l.name, nil},
				option{"tag", "KEY=RE", "a tag's value; repeatable", &l.tags, nil},
				option{"role", "RE", "the same as -tag role=RE", &l.role, nil},
				in(&l.format), option{"detailed", "", "", new(bool), nil},
				option{text: "Waiting"},
				option{"wait", "N", "wait until N of those listed are alive, even for the\nagent to start; exit status 1 if it took too long", &l.wait, nil},
				option{"timeout", "DURATION", "how long to wait (default: for ever)", &l.timeout, nil}),
			run: func([]string) error { return l.run(c) }},
		{name: "watch", short: "shows who is there, and then what happens, as it happens",
			examples: `  {} watch
  {} watch -event member-failed,user:deploy
  {} watch -format json      one object a line, for programs
  {} watch -event user:done -n 1 -timeout 60s   wait for an event
`,
			options: c.with(option{text: "Options"},
				option{"event", "EVENT[,EVENT...]", "what to show, as in -event-handler; 'member' is who is\nthere at the start (default: *)", &w.event, nil},
				in(&w.format),
				option{"n", "N", "end after N events, not counting who is there at first", &w.n, nil},
				option{"timeout", "DURATION", "with -n: exit status 1 if it takes longer", &w.timeout, nil}),
			run: func([]string) error { return w.run(c) }},
		{name: "query", args: "NAME [PAYLOAD]", short: "asks members; their handlers' output is the answer", minArgs: 1, maxArgs: 2,
			examples: "  {} query load\n  {} query -tag role=db master\n  {} query -node web1 -node web2 -timeout 3s -format json health\n",
			options: c.with(option{text: "Options"},
				option{"node", "NAME", "ask only this member; repeatable", &q.nodes, nil},
				option{"tag", "KEY=RE", "ask only those with such a tag; repeatable", &q.tags, nil},
				option{"timeout", "DURATION", "how long to wait for the slowest (default: 15s)", &q.timeout, nil},
				option{"no-ack", "", "do not show who has the query", &q.noAck, nil}, in(&q.format)),
			run: func(args []string) error { return q.run(c, args[0], []byte(strings.Join(args[1:], ""))) }},
		{name: "info", short: "shows what the agent knows of itself",
			examples: "  {} info\n  {} info -format json\n", options: c.with(option{text: "Options"}, in(&infoFormat)),
			run: func([]string) error { return c.info(infoFormat) }},
	}
}

// acts are the commands that change something, and those that ask nobody.
func (c *client) acts() []*command {
	var replay, prune bool
	coalesce := true
	var set, drop []string
	return []*command{
		{name: "tags", short: "changes the tags of the running agent",
			examples: "  {} tags -set state=drain\n  {} tags -set health=ok -set zone=b -delete state\n",
			options: c.with(option{text: "Options"}, option{"set", "KEY=VALUE", "sets a tag; repeatable", &set, nil},
				option{"delete", "KEY", "removes a tag; repeatable", &drop, nil}),
			run: func([]string) error {
				tags, err := parseTags("-set", set)
				if err == nil && len(set)+len(drop) == 0 {
					err = misuse("for example: -set state=drain", "nothing to change: give -set or -delete")
				}
				if err != nil {
					return err
				}
				return c.do(request{Op: "tags", Args: string(tags), Drop: strings.Join(drop, "\x00")}, rpcTimeout, "Successfully updated agent tags\n")
			}},
		{name: "event", args: "NAME [PAYLOAD]", short: "sends a user event to the handlers of every member", minArgs: 1, maxArgs: 2,
			examples: "  {} event deploy\n  {} event deploy 3f2c1aa       with a payload, the handlers' input\n  {} event -coalesce=false log \"$(uptime)\"\n",
			options:  c.with(option{text: "Options"}, option{"coalesce", "", "of events of one name that wait for a handler, only the\nlast is run (default: true)", &coalesce, nil}),
			run: func(args []string) error {
				payload := []byte(strings.Join(args[1:], ""))
				if err := checkPayload("event", args[0], payload); err != nil {
					return err
				}
				return c.do(request{Op: "event", Name: args[0], Payload: payload, Merge: coalesce}, rpcTimeout,
					fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(args[0], ""), coalesce))
			}},
		{name: "join", args: "ADDR...", short: "makes the agent join the cluster of another node", minArgs: 1, maxArgs: 1000,
			examples: "  {} join 10.0.2.15\n  {} join 10.0.2.15:7946 node2.example.com '[2001:db8::7]:7946'\n",
			options:  c.with(option{text: "Options"}, option{"replay", "", "run handlers for the remembered events of that cluster", &replay, nil}),
			run: func(addrs []string) error {
				if err := checkAddrs("join", addrs); err != nil {
					return err
				}
				return c.do(request{Op: "join", Args: strings.Join(addrs, "\x00"), Replay: replay}, slowTimeout, "Successfully joined cluster by contacting %d nodes.\n")
			}},
		{name: "leave", short: "makes the agent leave the cluster and stop", examples: "  {} leave\n", options: c.with(),
			run: func([]string) error { return c.do(request{Op: "leave"}, slowTimeout, "Graceful leave complete\n") }},
		{name: "force-leave", args: "NAME", short: "turns a failed member into one that left", minArgs: 1, maxArgs: 1,
			examples: "  {} force-leave web3           a failed member counts as left, everywhere\n  {} force-leave -prune web3    it vanishes from the list\n",
			options:  c.with(option{text: "Options"}, option{"prune", "", "forget the member altogether", &prune, nil}),
			run: func(args []string) error {
				return c.do(request{Op: "force-leave", Name: args[0], Prune: prune}, rpcTimeout, "")
			}},
		{name: "keygen", short: "prints a new key for -encrypt", examples: "  {} keygen\n  HAMLET_ENCRYPT=$({} keygen) {} agent\n",
			run: func([]string) error {
				key := make([]byte, keySize)
				rand.Read(key) // never fails
				return output(base64.StdEncoding.EncodeToString(key) + "\n")
			}},
		{name: "version", short: "prints the version", examples: "  {} version\n",
			run: func([]string) error {
				return output(fmt.Sprintf("hamlet %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH))
			}},
	}
}

func badFormat(format string) error {
	if format != "text" && format != "json" {
		return misuse("", "-format is text or json, not %q", format)
	}
	return nil
}

// parseTags checks and packs KEY=VALUE options.
func parseTags(option string, list []string) (Tags, error) {
	kv := make(map[string]string)
	for _, t := range list {
		k, v, ok := strings.Cut(t, "=")
		if !ok {
			return "", misuse("for example: "+option+" role=web", "%s takes KEY=VALUE, not %q", option, t)
		}
		kv[k] = v
	}
	tags, err := makeTags(kv)
	if err != nil {
		err = misuse("", "%s: %v", option, err)
	}
	return tags, err
}

// selection is which members a user means.
type selection struct {
	status, name, role string
	tags               []string
}

// conditions are what a member must fulfil; the first is about its status.
func (s *selection) conditions() (conds []func(Member) bool, err error) {
	add := func(option, re string, field func(Member) (string, bool)) {
		r, rerr := regexp.Compile("^(?s:" + re + ")$")
		if se, ok := errors.AsType[*syntax.Error](rerr); ok {
			err = misuse("", "%s: %q is not a regular expression: %s", option, re, se.Code)
		}
		conds = append(conds, func(m Member) bool { v, ok := field(m); return ok && r.MatchString(v) })
	}
	add("-status", cmp.Or(s.status, ".*"), func(m Member) (string, bool) { return m.Status.String(), true })
	add("-name", cmp.Or(s.name, ".*"), func(m Member) (string, bool) { return m.Name, true })
	if s.role != "" {
		s.tags = append(s.tags, "role="+s.role)
	}
	for _, t := range s.tags {
		key, re, ok := strings.Cut(t, "=")
		if !ok {
			return nil, misuse("for example: -tag role=web", "-tag takes KEY=RE, not %q", t)
		}
		add("-tag", re, func(m Member) (string, bool) { v, ok := m.Tags.asMap()[key]; return v, ok })
	}
	return conds, err
}

func choose(ms []Member, conds []func(Member) bool) []Member {
	return slices.DeleteFunc(ms, func(m Member) bool {
		return slices.ContainsFunc(conds, func(cond func(Member) bool) bool { return !cond(m) })
	})
}

// living are the names of those that are alive.
func living(ms []Member) (names []string) {
	for _, m := range ms {
		if m.Status == statusAlive {
			names = append(names, m.Name)
		}
	}
	return names
}

// listing is what a user asks of the members.
type listing struct {
	selection
	format  string
	wait    int
	timeout time.Duration
}

func (l *listing) run(c *client) error {
	conds, err := l.conditions()
	switch err = cmp.Or(err, badFormat(l.format)); {
	case err != nil:
		return err
	case l.timeout > 0 && l.wait == 0:
		return misuse("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
	case l.wait > 0 && !conds[0](Member{Status: statusAlive}):
		return misuse("", "-wait counts the living, and -status %q leaves them out", l.status)
	}
	const pause = 100 * ms
	var there []string // the living at the last look
	for start, answered := time.Now(), false; ; time.Sleep(pause) {
		patience := rpcTimeout
		if l.timeout > 0 {
			patience = min(patience, max(l.timeout-time.Since(start), pause))
		}
		ms, err := c.members(patience)
		if err == nil {
			ms = choose(ms, conds)
			there, answered = living(ms), true
			if len(there) >= l.wait && l.format == "json" {
				return output(membersJSON(ms))
			} else if len(there) >= l.wait {
				return output(membersText(ms))
			}
		}
		f, ok := errors.AsType[*failure](err)
		late := l.timeout > 0 && time.Since(start)+pause >= l.timeout
		switch {
		case late && answered:
			return trouble("", "%d of %d members alive after %v: %s", len(there), l.wait, l.timeout, cmp.Or(strings.Join(there, ", "), "none"))
		case err != nil && (l.wait == 0 || late || !ok || !f.again):
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
		row := [4]string{printable(m.Name, ""), m.Addr.String(), m.Status.String(), printable(strings.Join(m.Tags.pairs(), ","), "")}
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

func membersJSON(ms []Member) string {
	var list []any
	for _, m := range ms {
		list = append(list, pairs{"name", m.Name, "addr", m.Addr.String(), "port", m.Addr.Port(), "tags", tagPairs(m), "status", m.Status.String()})
	}
	return toJSON(pairs{"members", list}, "") + "\n"
}

func tagPairs(m Member) (kv pairs) {
	for _, p := range m.Tags.pairs() {
		k, v, _ := strings.Cut(p, "=")
		kv = append(kv, k, v)
	}
	return kv
}

// info shows the agent's facts: group, key, value; and so on.
func (c *client) info(format string) error {
	if err := badFormat(format); err != nil {
		return err
	}
	return c.call(request{Op: "info"}, rpcTimeout, func(a answer, _ []update) error {
		facts, groups, text := list(a.Text), pairs{}, ""
		for i := 0; i+2 < len(facts); i += 3 {
			if len(groups) == 0 || groups[len(groups)-2] != facts[i] {
				groups = append(groups, facts[i], pairs{})
				text += facts[i] + ":\n"
			}
			if key, value := facts[i+1], facts[i+2]; key != "" { // else the group may be empty
				groups[len(groups)-1] = append(groups[len(groups)-1].(pairs), key, value)
				text += fmt.Sprintf("\t%s = %s\n", printable(key, ""), printable(value, ""))
			}
		}
		if format == "json" {
			text = toJSON(groups, "") + "\n"
		}
		return output(text)
	})
}

// watching is what a user wants to see of the stream of events.
type watching struct {
	event, format string
	n             int
	timeout       time.Duration
}

func (w *watching) run(c *client) error {
	kinds := strings.Split(w.event, ",")
	err := checkEvents(slices.DeleteFunc(slices.Clone(kinds), func(ev string) bool { return ev == eventNames[0] }))
	switch {
	case err != nil:
		return misuse(fmt.Sprintf("'%s help watch' shows some", prog), "-event: %v", err)
	case badFormat(w.format) != nil:
		return badFormat(w.format)
	case w.timeout > 0 && w.n == 0:
		return misuse("for example: -n 1 -timeout 60s", "-timeout needs -n N")
	case w.timeout > 0:
		time.AfterFunc(w.timeout, func() { exit(trouble("", "fewer than %d events within %v", w.n, w.timeout)) })
	}
	seen := 0
	return c.call(request{Op: "watch"}, rpcTimeout, func(a answer, us []update) error {
		text := w.lost(a.Lost)
		for _, u := range us {
			if wants(kinds, a.Kind, u.Event) {
				text += w.line(a, u)
				seen += min(int(a.Kind), 1)
			}
		}
		if err := output(text); err != nil || w.n == 0 || seen < w.n {
			return err
		}
		return io.EOF // enough
	})
}

func (w *watching) lost(n int) string {
	switch {
	case n == 0:
		return ""
	case w.format == "json":
		return fmt.Sprintf("{\"lost\": %d}\n", n)
	}
	return fmt.Sprintf("(%d lines are missing here: this reader was too slow)\n", n)
}

// line is one event.
func (w *watching) line(a answer, u update) string {
	at, m := time.Unix(0, a.At), u.Member
	member := a.Kind < eventUser
	switch {
	case w.format == "json" && member:
		return toJSON(pairs{"time", at.Format(time.RFC3339Nano), "event", a.Kind.String(), "name", m.Name, "addr", m.Addr.String(),
			"tags", tagPairs(m), "status", m.Status.String()}, "-") + "\n"
	case w.format == "json":
		return toJSON(pairs{"time", at.Format(time.RFC3339Nano), "event", a.Kind.String(), "name", u.Event, "payload", string(u.Payload),
			"ltime", u.LTime, "from", m.Name}, "-") + "\n"
	}
	what := fmt.Sprintf("%s %s", u.Event, u.Payload)
	if member {
		what = fmt.Sprintf("%s %s %s %s", m.Name, m.Addr, m.Status, strings.Join(m.Tags.pairs(), ","))
	}
	return strings.TrimRight(fmt.Sprintf("%s %s: %s", at.Format("2006/01/02 15:04:05"), a.Kind, printable(what, "")), " ") + "\n"
}

// asking is a query as its user wants it, and what has come of it.
type asking struct {
	selection
	nodes     []string
	format    string
	timeout   time.Duration
	noAck     bool
	silent    []string // asked, and no answer yet
	acks      []any
	responses pairs
	failures  pairs
}

func (q *asking) run(c *client, name string, payload []byte) error {
	conds, err := q.conditions()
	if err = cmp.Or(err, badFormat(q.format), checkPayload("query", name, payload)); err != nil {
		return err
	}
	who := q.nodes
	if len(q.tags) > 0 {
		ms, err := c.members(rpcTimeout)
		if err != nil {
			return err
		}
		who = slices.DeleteFunc(living(choose(ms, conds)), func(name string) bool { return len(q.nodes) > 0 && !slices.Contains(q.nodes, name) })
		if len(who) == 0 {
			return trouble("", "%v", errNobody)
		}
	}
	req := request{Op: "query", Name: name, Payload: payload, Args: strings.Join(who, "\x00"), Within: q.timeout}
	if err := c.call(req, rpcTimeout, func(a answer, us []update) error {
		if a.Text != "" {
			q.silent = list(a.Text)
			return q.print("Query '%s' dispatched\n", name)
		}
		for _, u := range us {
			if err := q.heard(a.Reply, u.Member.Name, string(u.Payload)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if q.format == "json" {
		result := pairs{"Acks", q.acks, "Responses", q.responses}
		if len(q.failures) > 0 {
			result = append(result, "Failures", q.failures)
		}
		err = output(toJSON(result, "") + "\n")
	} else {
		if !q.noAck {
			q.print("Total Acks: %d\n", len(q.acks))
		}
		err = q.print("Total Responses: %d\n", len(q.responses)/2)
	}
	if err == nil && len(q.silent) > 0 {
		err = trouble("", "no answer within %v from %s", q.timeout, strings.Join(q.silent, ", "))
	}
	return err
}

// print prints where the format is text.
func (q *asking) print(format string, a ...any) error {
	if q.format == "json" {
		return nil
	}
	return output(printable(fmt.Sprintf(format, a...), "\n\t"))
}

// heard takes what a member says: that it has the query, or its answer.
func (q *asking) heard(r reply, from, text string) error {
	if r != replyHeard {
		q.silent = slices.DeleteFunc(q.silent, func(name string) bool { return name == from })
	}
	plain := strings.TrimSuffix(text, "\n")
	switch r {
	case replyHeard:
		q.acks = append(q.acks, from)
		if !q.noAck {
			return q.print("Ack from '%s'\n", from)
		}
	case replyDone:
		q.responses = append(q.responses, from, text)
		return q.print("Response from '%s': %s\n", from, plain)
	case replyFailed:
		q.failures = append(q.failures, from, text)
		return q.print("Failed on '%s': %s\n", from, plain)
	}
	return nil
}

// ---- the agent ----

// agentOptions are the options of the agent; those that need checking as the
// user wrote them.
type agentOptions struct {
	gossip                                                   gossipConfig
	handlers                                                 handlerConfig
	bind, advertise, iface, rpcAddr, rpcAuth, role, logLevel string
	tags, keys, seeds                                        []string
	leaveOnTerminate                                         bool
}

func agentCommand() *command {
	a := &agentOptions{
		gossip:   gossipConfig{nodeConfig: nodeConfig{reapAfter: 24 * time.Hour}},
		handlers: handlerConfig{timeout: 10 * time.Minute, grace: handlerGrace},
		bind:     "0.0.0.0:" + defaultPort, rpcAddr: defaultRPC, logLevel: "info",
	}
	c := &command{
		name: "agent", short: "runs a node until it is told to stop",
		examples: `  {} agent
  {} agent -join 10.0.2.15
  {} agent -node web1 -role web -join seed1.example.com,seed2
  {} agent -log-level=debug -event-handler=./handler.sh
  {} agent -event-handler 'member-join,member-leave,member-failed=./lb.sh'
  {} agent -event-handler 'query:load=uptime'
  HAMLET_JOIN=seed1,seed2 HAMLET_TAG=role=web,zone=b {} agent

Every option can also be set in the environment: -log-level as HAMLET_LOG_LEVEL.
Lists are split on commas, or on newlines if there are any. A flag wins.

SIGINT (Ctrl-C) leaves the cluster gracefully. SIGTERM ends at once, so that the
others see this node fail. A second signal ends at once, with exit status 1.
SIGHUP does nothing.
`,
		options: []option{
			{text: "The node"},
			{"node", "NAME", "its name, unique in the cluster (default: the host name)", &a.gossip.member.Name, nil},
			{"role", "ROLE", "the same as -tag role=ROLE", &a.role, nil},
			{"tag", "KEY=VALUE", "a tag that others see; repeatable", &a.tags, nil},
			{text: "Addresses"},
			{"bind", "IP:PORT", "where to listen for gossip, UDP and TCP\n(default: 0.0.0.0:7946)", &a.bind, nil},
			{"advertise", "HOST[:PORT]", "the address that others are told (default: the address\nfrom which packets to the first seed go out)", &a.advertise, nil},
			{"iface", "NAME", "advertise the address of this network interface", &a.iface, nil},
			{"rpc-addr", "HOST:PORT", "where to listen for the other commands\n(default: " + defaultRPC + ")", &a.rpcAddr, nil},
			{"rpc-auth", "TOKEN", "a token that the other commands must give", &a.rpcAuth, nil},
			{text: "The cluster"},
			{"join", "HOST[:PORT]", "a node to join, tried until it answers; repeatable,\nor separated by commas", &a.seeds, nil},
			{"retry-join", "", "", &a.seeds, nil},
			{"retry-interval", "", "", new(string), nil},
			{"retry-max", "N", "give up after N rounds of trying: 10 take some two\nminutes, each further one 30 s (default: never)", &a.gossip.retryMax, nil},
			{"replay", "", "run handlers for the remembered events of before its\ntime, too", &a.gossip.replay, nil},
			{"cluster", "NAME", "nodes with another cluster name are not let in", &a.gossip.cluster, nil},
			{"encrypt", "KEY", "a key from '{} keygen': only nodes with the key can\nread or join. Repeatable: the first seals, all can open.\nOther users can see arguments: better set HAMLET_ENCRYPT", &a.keys, nil},
			{"reap-after", "DURATION", "when failed and left members are forgotten\n(default: 24h)", &a.gossip.reapAfter, nil},
			{"leave-on-terminate", "", "leave gracefully at SIGTERM, too", &a.leaveOnTerminate, nil},
			{text: "Handlers"},
			{"event-handler", "SPEC", "a script to run on events; repeatable. SPEC is SCRIPT or\nEVENT[,EVENT...]=SCRIPT; an EVENT is member-join,\nmember-leave, member-failed, member-update, member-reap,\nuser, user:NAME, query, query:NAME or * (all of them)", &a.handlers.specs, nil},
			{"handler-timeout", "DURATION", "when a script is stopped (default: 10m)", &a.handlers.timeout, nil},
			{text: "Log"},
			{"log-level", "LEVEL", "trace, debug, info, warn or err (default: info)", &a.logLevel, nil},
		},
	}
	known := make(map[string]bool)
	for i, o := range c.options {
		name := "HAMLET_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
		c.options[i].env, known[name] = []string{name}, true
	}
	c.run = func([]string) error { return a.run(known) }
	return c
}

// check fills the configuration from what the user wrote and returns the reason
// for the advertised address.
func (a *agentOptions) check() (why string, err error) {
	cfg := &a.gossip
	if cfg.member.Name == "" {
		cfg.member.Name, _ = os.Hostname()
	}
	if err := validName(cfg.member.Name); err != nil {
		return "", misuse("choose a name with -node", "%v", err)
	}
	for _, s := range a.seeds {
		cfg.seeds = append(cfg.seeds, strings.Split(s, ",")...)
	}
	if err := checkAddrs("-join", cfg.seeds); err != nil {
		return "", err
	}
	tags, err := parseTags("-tag", a.tags)
	if err != nil {
		return "", err
	}
	if a.role != "" {
		if old, ok := tags.asMap()["role"]; ok && old != a.role {
			return "", misuse("give one of them", "-role %q and -tag role=%q differ", a.role, old)
		}
		if tags, err = parseTags("-role", append(tags.pairs(), "role="+a.role)); err != nil {
			return "", err
		}
	}
	cfg.member.Tags = tags
	if cfg.keys, err = parseKeys(a.keys); err != nil {
		return "", misuse(fmt.Sprintf("'%s keygen' makes a key", prog), "-encrypt: %v", err)
	}
	if cfg.bind, err = parseBind(a.bind); err != nil {
		return "", misuse("-bind takes IP:PORT, such as 0.0.0.0:7946 or [::1]:7946", "-bind: %v", err)
	}
	cfg.moves = cfg.bind.Addr().IsUnspecified() && a.advertise == "" && a.iface == ""
	cfg.member.Addr, why, err = a.advertised()
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

// run runs the agent; known are its variables in the environment.
func (a *agentOptions) run(known map[string]bool) error {
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
	var g *gossip
	started := make(chan struct{}) // g is there
	a.handlers.log = logger
	a.handlers.env = func() []string {
		<-started
		self, alone := g.me()
		return handlerEnv(self, alone, loopbackFor(ln.Addr()), a.rpcAuth)
	}
	handlers, err := newHandlers(a.handlers)
	if err != nil {
		return misuse(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.rpcPort = uint16(ln.Addr().(*net.TCPAddr).Port)
	a.gossip.answers, a.gossip.log, a.gossip.events = handlers.answers(), logger, handlers.deliver
	if g, err = startGossip(a.gossip); err != nil {
		return startFailure("gossip", "-bind", a.gossip.bind.String(), err)
	}
	close(started)
	self, _ := g.me()
	a.banner(self, why, ln.Addr(), logger)
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "HAMLET_") && !known[name] {
			logger.Printf("[WARN] there is no option %s: it is not looked at", name)
		}
	}
	logs.start()
	rpc, err := serveRPC(ln, g, a.rpcAuth, func() []string { return a.info(g, handlers) })
	if err != nil {
		return err
	}
	return a.wait(g, rpc, handlers, signals, logger)
}

func listenRPC(addr string) (net.Listener, error) {
	host, port, err := hostPort(addr, defaultRPC[len("127.0.0.1:"):])
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
	bind, keyed := a.gossip.bind, len(a.gossip.keys) > 0
	if bind.Port() == 0 {
		bind = netip.AddrPortFrom(bind.Addr(), self.Addr.Port())
	}
	fmt.Printf("==> Starting hamlet agent...\n==> Starting hamlet agent RPC...\n==> hamlet agent running!\n"+
		"    Node name: '%s'\n    Bind addr: '%s'\n    Advertise: '%s' (%s)\n     RPC addr: '%s'\n    Encrypted: %v\n",
		self.Name, bind, self.Addr, why, rpc, keyed)
	switch ip := self.Addr.Addr(); {
	case why == noAddress:
		logger.Printf("[WARN] advertising %s, which other machines cannot reach: %s (-advertise sets one)", self.Addr, why)
	case !keyed && !ip.IsPrivate() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast():
		logger.Printf("[WARN] %s is a public address, and there is no key: whoever reaches it can join and lie (-encrypt sets one)", self.Addr)
	}
	if !rpc.(*net.TCPAddr).IP.IsLoopback() {
		without := ""
		if a.rpcAuth == "" {
			without = " without a token"
		}
		logger.Printf("[WARN] the RPC listens on %s%s: whoever reaches it controls this agent (-rpc-auth sets a token)", rpc, without)
	}
}

// info is what the agent knows of itself: group, key, value; and so on.
func (a *agentOptions) info(g *gossip, handlers *handlers) (facts []string) {
	add := func(group string, kv ...any) {
		for i := 0; i < len(kv); i += 2 {
			facts = append(facts, group, fmt.Sprint(kv[i]), fmt.Sprint(kv[i+1]))
		}
	}
	self, _ := g.me()
	add("agent", "name", self.Name, "addr", self.Addr, "version", version, "uptime", time.Since(g.start).Round(time.Second))
	add("event_handlers", "", "")
	for _, h := range handlers.all {
		waiting, lost, last := h.state()
		events := strings.Join(h.events, ",") + ":"
		add("event_handlers", events, h.script, events+" waiting", waiting, events+" dropped", lost, events+" last run", last)
	}
	add("runtime", "arch", runtime.GOARCH, "cpu_count", runtime.NumCPU(), "goroutines", runtime.NumGoroutine(),
		"max_procs", runtime.GOMAXPROCS(0), "os", runtime.GOOS, "version", runtime.Version())
	add("serf", "encrypted", len(a.gossip.keys) > 0)
	g.do(func(n *node) error { add("serf", n.info()...); return nil })
	add("tags", append([]any{"", ""}, tagPairs(self)...)...)
	return facts
}

// wait returns when the agent has ended: told by a signal, by the leave
// command, or by itself.
func (a *agentOptions) wait(g *gossip, rpc *rpcServer, handlers *handlers, signals <-chan os.Signal, logger *log.Logger) error {
	ended := make(chan struct{})
	go func() { <-g.done; rpc.close(); handlers.close(g.last...); close(ended) }()
	var told time.Time // to stop
	for {
		var s os.Signal
		select {
		case <-ended:
			if err := g.err; errors.Is(err, errTaken) {
				return trouble("choose another name with -node", "%v", err)
			}
			return g.err
		case s = <-signals:
		}
		switch {
		case s == syscall.SIGHUP: // Serf would read its configuration again
			logger.Printf("[INFO] hangup: there is no configuration to reload, carrying on")
		case time.Since(told) < sameSignal:
		case !told.IsZero():
			return trouble("", "%v while stopping: ended at once", s)
		case s == os.Interrupt || s == syscall.SIGTERM && a.leaveOnTerminate:
			told = time.Now()
			logger.Printf("[INFO] %v: leaving the cluster, a second signal ends at once", s)
			go func() {
				if err := g.leave(); err != nil {
					logger.Printf("[WARN] leave: %v", err)
				}
			}()
		default: // peers notice at once; handlers get their grace
			told = time.Now()
			logger.Printf("[INFO] %v: ending without leaving", s)
			g.close()
		}
	}
}

// startFailure explains why a port could not be opened.
func startFailure(what, option, addr string, err error) error {
	no, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return trouble("", "cannot start %s at %s: %v", what, addr, err)
	}
	hint := map[syscall.Errno]string{
		syscall.EADDRINUSE:    "is an agent running there already? choose another address with " + option,
		syscall.EADDRNOTAVAIL: "this machine has no such address; choose another with " + option,
		syscall.EACCES:        "ports below 1024 need root; choose another with " + option,
	}[no]
	return trouble(hint, "cannot listen on %s for %s: %v", addr, what, no)
}

// waitAtMost reports whether wait returned within d.
func waitAtMost(d time.Duration, wait func()) bool {
	done := make(chan struct{})
	go func() { wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
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
	bind := a.gossip.bind
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
	addr, why = chooseAdvertise(bind, a.gossip.seeds)
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

// usable reports whether other machines may reach ip at a socket bound to bind.
func usable(ip, bind netip.Addr) bool {
	return ip.IsGlobalUnicast() && ip.Zone() == "" && fits(ip, bind)
}

// fits reports whether a socket bound to bind takes packets of ip's family.
func fits(ip, bind netip.Addr) bool { return ip.Is4() == bind.Is4() || bind == netip.IPv6Unspecified() }

// isMine reports whether others can reach this machine at ip, as far as it knows.
func isMine(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err != nil || !ip.IsLoopback() && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == ip
	})
}

// resolve looks up all addresses of all hosts at the same time; a host without
// a port means 7946. What takes longer than 1.5 s counts as failed.
func resolve(ctx context.Context, hosts []string) (addrs []netip.AddrPort, errs []string) {
	ctx, cancel := context.WithTimeout(ctx, resolveFor)
	defer cancel()
	type result struct {
		addrs []netip.AddrPort
		err   error
	}
	results := make([]result, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() { results[i].addrs, results[i].err = resolveOne(ctx, h, defaultPort) })
	}
	wg.Wait()
	for i, r := range results {
		if r.err != nil {
			errs = append(errs, fmt.Sprintf("%s: %v", hosts[i], r.err))
		}
		for _, a := range r.addrs {
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs, errs
}

// resolveOne looks up all addresses of one host; port stands in for a missing one.
func resolveOne(ctx context.Context, s, port string) ([]netip.AddrPort, error) {
	host, port, err := hostPort(s, port)
	if err != nil {
		return nil, err
	}
	p, _ := strconv.ParseUint(port, 10, 16)
	if ip, err := netip.ParseAddr(host); err == nil { // looked up, it would lose its zone
		return []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), uint16(p))}, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(p)))
	}
	return addrs, nil
}

// hostPort splits HOST, HOST:PORT, IP, [IPv6] or [IPv6]:PORT; port stands in
// for a missing one.
func hostPort(s, port string) (string, string, error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, port, nil
	}
	h, p, err := net.SplitHostPort(s)
	if err != nil {
		h, p, err = net.SplitHostPort(s + ":" + port)
	}
	_, perr := strconv.ParseUint(p, 10, 16)
	odd := func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(" /@[]", r) }
	if err != nil || perr != nil || strings.HasPrefix(h, "-") || strings.ContainsFunc(h, odd) {
		return "", "", fmt.Errorf("%q is not an address", s)
	}
	return h, p, nil
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
