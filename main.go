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
	"text/tabwriter"
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
	run               func(args []string) error
}

// option defines a flag and its lines in the help. Without a variable it heads the
// options that follow; without a text it is one of Serf's that is taken in silence.
type option struct {
	name, text string // the name, and what it takes
	value      any    // *string, *[]string, *bool, *int or *time.Duration; holds the default
}

func newCommands() []*command {
	q := &ask{addr: defaultRPC, format: "text", event: "*", within: 15 * time.Second}
	asking := slices.Concat(q.looks(), q.talks(), q.acts())
	for _, c := range asking {
		c.options = append(c.options, option{name: "Reaching the agent"},
			option{"rpc-addr ADDR", "where its RPC listens, or SERF_RPC_ADDR\n(default: " + defaultRPC + ")", &q.addr},
			option{"rpc-auth TOKEN", "the token that it asks for, or SERF_RPC_AUTH", &q.token})
	}
	return slices.Concat([]*command{agentCommand()}, asking, []*command{
		{"keygen", "", "prints a new key for -encrypt", "  {} keygen\n  HAMLET_ENCRYPT=$({} keygen) {} agent\n", nil,
			func([]string) error {
				key := make([]byte, keySize)
				rand.Read(key) // never fails
				return output(base64.StdEncoding.EncodeToString(key) + "\n")
			}},
		{"version", "", "prints the version", "  {} version\n", nil,
			func([]string) error {
				return output(fmt.Sprintf("hamlet %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH))
			}},
	})
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

// serfWords is what to do instead of what Serf has and hamlet has not.
var serfWords = map[string]string{
	"-snapshot -rejoin":        "nothing is kept on disk: a restarted agent finds its cluster by -join, or is found",
	"-config-file -config-dir": "options come from flags or from HAMLET_ variables, such as HAMLET_JOIN",
	"-profile":                 "there is one timing, for LAN and WAN alike",
	"-discover -mdns-iface -mdns-disable-ipv4 -mdns-disable-ipv6": "name the seeds with -join; " +
		"a DNS name with many addresses will do",
	"-keyring-file":        "give each key with -encrypt or HAMLET_ENCRYPT: the first seals, any opens",
	"-tags-file":           "give tags with -tag or HAMLET_TAG, and change them with the tags command",
	"-syslog":              "the log goes to stderr: let systemd or 'logger' take it",
	"-protocol":            "there is one version: run the same hamlet everywhere",
	"-broadcast-timeout":   "nothing waits for a broadcast",
	"-disable-compression": "nothing is compressed",
	"-relay-factor":        "an answer is sent again until it arrives",
	"keys":                 "restart the agents one by one with -encrypt OLD,NEW, then NEW,OLD, then NEW",
	"reachability":         "every member is looked at all the time: see 'members' and 'info'",
	"rtt":                  "there are no network coordinates: use ping",
	"monitor":              "'watch' streams events, and the log is the agent's stderr",
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

func (o option) flag() string { return strings.Fields(o.name)[0] }

func (o option) help() string {
	const indent = "\n                        "
	left := "  -" + o.name
	switch {
	case o.value == nil:
		return "\n" + o.name + ":\n"
	case o.text == "":
		return ""
	case len(left) > len(indent)-3:
		left += indent
	}
	return fmt.Sprintf("%-*s%s\n", len(indent)-1, left, strings.ReplaceAll(o.text, "\n", indent))
}

// parse sets the options from args and the environment and returns the
// arguments that follow them.
func (c *command) parse(args []string) ([]string, error) {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	given := make(map[string]bool)
	for _, o := range c.options {
		set := func(s string) error { given[o.flag()] = true; return o.set(s) }
		if _, ok := o.value.(*bool); ok {
			fs.BoolFunc(o.flag(), "", set)
		} else if o.value != nil {
			fs.Func(o.flag(), "", set)
		}
	}
	err := fs.Parse(args)
	for _, o := range c.options {
		for _, env := range c.env(o) {
			if os.Getenv(env) != "" && !given[o.flag()] && err == nil {
				given[o.flag()], err = true, o.fromEnv(env)
			}
		}
	}
	if _, name, _ := strings.Cut(fmt.Sprint(err), "not defined: "); serfWord(name) != nil {
		return nil, serfWord(name)
	} else if errors.Is(err, flag.ErrHelp) {
		return nil, err
	}
	args = fs.Args()
	if err = cmp.Or(err, c.checkArgs(args, fs)); err != nil {
		return nil, misuse(fmt.Sprintf("'%s help %s' shows how to use it", prog, c.name), "%s: %v", c.name, err)
	}
	return args, nil
}

// checkArgs compares the arguments with what the command takes: WORD, [WORD] or WORD...
func (c *command) checkArgs(args []string, fs *flag.FlagSet) error {
	takes := strings.Fields(c.args)
	rest := args[min(len(args), len(takes)):]
	switch {
	case len(args) == 0 && len(takes) > 0:
		return fmt.Errorf("%s is missing", c.args)
	case len(rest) > 0 && !strings.HasSuffix(c.args, "..."):
		if _, err := parseKeys(rest[:1]); err == nil {
			rest[0] = "(a key)" // which is never shown
		}
		return fmt.Errorf("unexpected argument %q", rest[0])
	}
	for _, arg := range args {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if strings.HasPrefix(arg, "-") && fs.Lookup(name) != nil {
			return fmt.Errorf("%s stands behind the arguments: options come before the name", arg)
		}
	}
	return nil
}

// env names the variables that an option is taken from if it is not given.
func (c *command) env(o option) []string {
	name := strings.ToUpper(strings.ReplaceAll(o.flag(), "-", "_"))
	switch {
	case c.name == "agent":
		return []string{"HAMLET_" + name}
	case strings.HasPrefix(name, "RPC_"):
		return []string{"SERF_" + name, "HAMLET_" + name}
	}
	return nil
}

// fromEnv sets the option from a variable. Lists are split on commas, or on
// newlines if there are any; the events in member-join,user:x=script stay with
// their script.
func (o option) fromEnv(env string) error {
	text, sep, events := os.Getenv(env), ",", ""
	if _, ok := o.value.(*[]string); !ok {
		if err := o.set(text); err != nil {
			return fmt.Errorf("invalid value %q for %s: %w", text, env, err)
		}
		return nil
	}
	if strings.Contains(text, "\n") {
		sep = "\n"
	}
	for item := range strings.SplitSeq(text, sep) {
		item = strings.TrimSpace(item)
		pair, quotes := strings.Contains(item, "="), strings.Count(item, `"`)%2+strings.Count(item, "'")%2
		if sep == "," && quotes > 0 || strings.HasPrefix(o.name, "tag ") && item != "" && !pair {
			return fmt.Errorf("%s is split at its commas, and %q is a part of it: "+
				"end it with a newline to have it split at newlines only", env, item)
		}
		if !pair && checkEvents([]string{item}) == nil {
			events += item + ","
		} else if item != "" {
			o.set(events + item)
			events = ""
		}
	}
	if events != "" {
		o.set(strings.TrimSuffix(events, ","))
	}
	return nil
}

// set sets what the option's value points to, or appends to a list.
func (o option) set(s string) (err error) {
	want := ""
	switch v := o.value.(type) {
	case *string:
		*v = s
	case *[]string:
		*v = append(*v, s)
	case *bool:
		want = "true or false"
		*v, err = strconv.ParseBool(s)
	case *int:
		want = "a number, 0 or more"
		n, e := strconv.ParseUint(s, 10, 31)
		*v, err = int(n), e
	case *time.Duration:
		want = "a duration, such as 500ms, 20s or 10m"
		if *v, err = time.ParseDuration(s); *v <= 0 {
			err = cmp.Or(err, errors.ErrUnsupported)
		}
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

// reason strips what the net and os packages put in front of an error number.
func reason(err error) error {
	if no, ok := errors.AsType[syscall.Errno](err); ok {
		return no
	}
	return err
}

// printable makes text from elsewhere safe to show: whatever is not graphic
// (escape sequences, bidi marks, broken UTF-8) is shown as in Go source,
// except for the characters in keep.
func printable(s, keep string) string {
	undo := []string{`\"`, `"`, `\\`, `\`}
	for _, r := range keep {
		undo = append(undo, strings.Trim(strconv.QuoteRune(r), "'"), string(r))
	}
	q := strconv.QuoteToGraphic(s)
	return strings.NewReplacer(undo...).Replace(q[1 : len(q)-1])
}

// pairs is a JSON object: key, value, key, value.
type pairs []any

// toJSON lays v out as Serf does, where nl is what begins a line, or (nl "") in
// one line. Not with encoding/json: that leaves DEL and the C1 controls as they
// are, and a terminal would obey them.
func toJSON(v any, nl string) string {
	inner, sep := nl+"  ", ","+nl+"  "
	if nl == "" {
		inner, sep = "", ", "
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
	if len(items) == 0 {
		return brackets
	}
	return brackets[:1] + inner + strings.Join(items, sep) + nl + brackets[1:]
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

// ---- the commands that ask a running agent ----

// ask is how a command reaches its agent, and what its user wants to know.
type ask struct {
	addr, token        string
	format             string // text or json
	status, name, role string
	tags, nodes        []string
	event              string
	count              int // how many members, or events, to wait for
	timeout, within    time.Duration
	noAck              bool
}

func (q *ask) call(req request, timeout time.Duration, each func(answer, []update) error) error {
	host, port, err := hostPort(q.addr, defaultRPCPort)
	if q.format != "text" && q.format != "json" {
		return misuse("", "-format is text or json, not %q", q.format)
	} else if err != nil {
		return misuse("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	return callRPC(net.JoinHostPort(host, port), q.token, req, timeout, each)
}

// do makes a call and says that it is done; %d stands for the nodes joined.
func (q *ask) do(req request, timeout time.Duration, done string) error {
	return q.call(req, timeout, func(a answer, _ []update) error {
		return output(strings.ReplaceAll(done, "%d", strconv.Itoa(a.Count)))
	})
}

func (q *ask) formatOption() option {
	return option{"format FORMAT", "text or json (default: text)", &q.format}
}

// looks are the commands that show who is there.
func (q *ask) looks() []*command {
	return []*command{
		{"members", "", "lists the members of the cluster", `  {} members                                list all members
  {} members -status alive -tag role=web    the living ones with a tag
  {} members -name 'db[0-9]+' -format json
  {} members -wait 3 -timeout 20s           wait until three are alive
`, []option{
			{name: "What to list (RE: a regular expression that matches the whole)"},
			{"status RE", "alive, leaving, left, failed", &q.status},
			{"name RE", "the member's name", &q.name},
			{"tag KEY=RE", "a tag's value; repeatable", &q.tags},
			{"role RE", "the same as -tag role=RE", &q.role},
			q.formatOption(), {"detailed", "", new(bool)},
			{name: "Waiting"},
			{"wait N", "wait until N of those listed are alive, even for the\n" +
				"agent to start; exit status 1 if it took too long", &q.count},
			{"timeout DURATION", "how long to wait (default: for ever)", &q.timeout},
		}, q.members},
		{"watch", "", "shows who is there, and then what happens, as it happens", `  {} watch
  {} watch -event member-failed,user:deploy
  {} watch -format json      one object a line, for programs
  {} watch -event user:done -n 1 -timeout 60s   wait for an event
`, []option{
			{name: "Options"},
			{"event EVENT[,EVENT...]", "what to show, as in -event-handler; 'member' is who is\n" +
				"there at the start (default: *)", &q.event},
			q.formatOption(),
			{"n N", "end after N events, not counting who is there at first", &q.count},
			{"timeout DURATION", "with -n: exit status 1 if it takes longer", &q.timeout},
		}, q.watch},
	}
}

// talks are the commands that speak with members and with the agent.
func (q *ask) talks() []*command {
	var set, drop []string
	return []*command{
		{"query", "NAME [PAYLOAD]", "asks members; their handlers' output is the answer", `  {} query load
  {} query -tag role=db master
  {} query -node web1 -node web2 -timeout 3s -format json health
`, []option{
			{name: "Options"},
			{"node NAME", "ask only this member; repeatable", &q.nodes},
			{"tag KEY=RE", "ask only those with such a tag; repeatable", &q.tags},
			{"timeout DURATION", "how long to wait for the slowest (default: 15s)", &q.within},
			{"no-ack", "do not show who has the query", &q.noAck}, q.formatOption(),
		}, q.query},
		{"info", "", "shows what the agent knows of itself", "  {} info\n  {} info -format json\n",
			[]option{{name: "Options"}, q.formatOption()}, q.info},
		{"tags", "", "changes the tags of the running agent", `  {} tags -set state=drain
  {} tags -set health=ok -set zone=b -delete state
`, []option{
			{name: "Options"},
			{"set KEY=VALUE", "sets a tag; repeatable", &set},
			{"delete KEY", "removes a tag; repeatable", &drop},
		}, func([]string) error {
			tags, err := parseTags("-set", set)
			if err == nil && len(set)+len(drop) == 0 {
				err = misuse("for example: -set state=drain", "nothing to change: give -set or -delete")
			}
			for _, key := range drop {
				if key == "" || strings.Contains(key, "=") {
					err = misuse("for example: -delete state", "-delete takes KEY, not %q", key)
				}
			}
			if err != nil {
				return err
			}
			req := request{Op: "tags", Args: string(tags), Drop: strings.Join(drop, "\x00")}
			return q.do(req, rpcTimeout, "Successfully updated agent tags\n")
		}},
	}
}

// acts are the commands that have something done.
func (q *ask) acts() []*command {
	var replay, prune bool
	coalesce := true
	return []*command{
		{"event", "NAME [PAYLOAD]", "sends a user event to the handlers of every member", `  {} event deploy
  {} event deploy 3f2c1aa       with a payload, the handlers' input
  {} event -coalesce=false log "$(uptime)"
`, []option{
			{name: "Options"},
			{"coalesce", "of events of one name that wait for a handler, only the\nlast is run (default: true)", &coalesce},
		}, func(args []string) error {
			req := request{Op: "event", Name: args[0], Payload: []byte(strings.Join(args[1:], "")), Merge: coalesce}
			if err := checkPayload("event", req.Name, req.Payload); err != nil {
				return err
			}
			done := fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(req.Name, ""), coalesce)
			return q.do(req, rpcTimeout, done)
		}},
		{"join", "ADDR...", "makes the agent join the cluster of another node", `  {} join 10.0.2.15
  {} join 10.0.2.15:7946 node2.example.com '[2001:db8::7]:7946'
`, []option{
			{name: "Options"},
			{"replay", "run handlers for the remembered events of that cluster", &replay},
		}, func(addrs []string) error {
			if err := checkAddrs("join", addrs); err != nil {
				return err
			}
			req := request{Op: "join", Args: strings.Join(addrs, "\x00"), Replay: replay}
			return q.do(req, slowTimeout, "Successfully joined cluster by contacting %d nodes.\n")
		}},
		{"leave", "", "makes the agent leave the cluster and stop", "  {} leave\n", nil, func([]string) error {
			return q.do(request{Op: "leave"}, slowTimeout, "Graceful leave complete\n")
		}},
		{"force-leave", "NAME", "turns a failed member into one that left",
			`  {} force-leave web3           a failed member counts as left, everywhere
  {} force-leave -prune web3    it vanishes from the list
`, []option{
				{name: "Options"},
				{"prune", "forget the member altogether", &prune},
			}, func(args []string) error {
				return q.do(request{Op: "force-leave", Name: args[0], Prune: prune}, rpcTimeout, "")
			}},
	}
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

// conditions are what a member must fulfil to be meant; the first is about its status.
func (q *ask) conditions() (conds []func(Member) bool, err error) {
	add := func(option, re string, field func(Member) (string, bool)) {
		r, rerr := regexp.Compile("^(?s:" + re + ")$")
		if se, ok := errors.AsType[*syntax.Error](rerr); ok {
			err = misuse("", "%s: %q is not a regular expression: %s", option, re, se.Code)
		}
		conds = append(conds, func(m Member) bool { v, ok := field(m); return ok && r.MatchString(v) })
	}
	add("-status", cmp.Or(q.status, ".*"), func(m Member) (string, bool) { return m.Status.String(), true })
	add("-name", cmp.Or(q.name, ".*"), func(m Member) (string, bool) { return m.Name, true })
	if q.role != "" {
		q.tags = append(q.tags, "role="+q.role)
	}
	for _, t := range q.tags {
		key, re, ok := strings.Cut(t, "=")
		if !ok {
			return nil, misuse("for example: -tag role=web", "-tag takes KEY=RE, not %q", t)
		}
		add("-tag", re, func(m Member) (string, bool) { v, ok := m.Tags.asMap()[key]; return v, ok })
	}
	return conds, err
}

// chosen asks for the members that fulfil all conditions; living are the names of
// those that are alive.
func (q *ask) chosen(conds []func(Member) bool, timeout time.Duration) (ms []Member, living []string, err error) {
	err = q.call(request{Op: "members"}, timeout, func(_ answer, us []update) error {
		for _, u := range us {
			if slices.ContainsFunc(conds, func(fulfils func(Member) bool) bool { return !fulfils(u.Member) }) {
				continue
			}
			if ms = append(ms, u.Member); u.Member.Status == statusAlive {
				living = append(living, u.Member.Name)
			}
		}
		return nil
	})
	return ms, living, err
}

func (q *ask) members([]string) error {
	conds, err := q.conditions()
	switch {
	case err != nil:
		return err
	case q.timeout > 0 && q.count == 0:
		return misuse("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
	case q.count > 0 && !conds[0](Member{Status: statusAlive}):
		return misuse("", "-wait counts the living, and -status %q leaves them out", q.status)
	}
	const pause = 100 * ms
	var there []string // the living at the last look
	for start, answered := time.Now(), false; ; time.Sleep(pause) {
		patience := rpcTimeout
		if q.timeout > 0 {
			patience = min(patience, max(q.timeout-time.Since(start), pause))
		}
		ms, living, err := q.chosen(conds, patience)
		if err == nil {
			if there, answered = living, true; len(there) >= q.count {
				return output(map[string]func([]Member) string{"text": membersText, "json": membersJSON}[q.format](ms))
			}
		}
		f, ok := errors.AsType[*failure](err)
		late := q.timeout > 0 && time.Since(start)+pause >= q.timeout
		switch {
		case late && answered:
			return trouble("", "%d of %d members alive after %v: %s", len(there), q.count, q.timeout,
				cmp.Or(strings.Join(there, ", "), "none"))
		case err != nil && (q.count == 0 || late || !ok || !f.again):
			return err
		}
	}
}

// membersText makes columns at least four blanks apart. The third is never
// narrower than "failed", so that tags stay in place when a member fails.
func membersText(ms []Member) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 4, ' ', 0)
	for _, m := range ms {
		tags := printable(strings.Join(m.Tags.pairs(), ","), "")
		fmt.Fprintf(w, "%s\t%s\t%-6s\t%s\n", printable(m.Name, ""), m.Addr, m.Status, tags)
	}
	w.Flush()
	return regexp.MustCompile(" +\n").ReplaceAllString(b.String(), "\n")
}

func membersJSON(ms []Member) string {
	var list []any
	for _, m := range ms {
		list = append(list, pairs{"name", m.Name, "addr", m.Addr.String(), "port", m.Addr.Port(),
			"tags", tagPairs(m), "status", m.Status.String()})
	}
	return toJSON(pairs{"members", list}, "\n") + "\n"
}

func tagPairs(m Member) (kv pairs) {
	for k, v := range m.Tags.all() {
		kv = append(kv, k, v)
	}
	return kv
}

// info shows what the agent says of itself, as text and as JSON.
func (q *ask) info([]string) error {
	return q.call(request{Op: "info"}, rpcTimeout, func(a answer, _ []update) error {
		text, json, _ := strings.Cut(a.Text, "\x00")
		return output(printable(map[string]string{"text": text, "json": json}[q.format], "\n\t"))
	})
}

func (q *ask) watch([]string) error {
	kinds, there := strings.Split(q.event, ","), eventNames[0]
	err := checkEvents(slices.DeleteFunc(slices.Clone(kinds), func(ev string) bool { return ev == there }))
	switch {
	case err != nil:
		return misuse(fmt.Sprintf("'%s help watch' shows some", prog), "-event: %v", err)
	case q.timeout > 0 && q.count == 0:
		return misuse("for example: -n 1 -timeout 60s", "-timeout needs -n N")
	case q.count > 0 && q.event == there:
		return misuse("", "-n counts events, and %q is none: it is who is there at the start", there)
	case q.timeout > 0:
		time.AfterFunc(q.timeout, func() { exit(trouble("", "fewer than %d events within %v", q.count, q.timeout)) })
	}
	seen := 0
	err = q.call(request{Op: "watch"}, rpcTimeout, func(a answer, us []update) error {
		text := ""
		if a.Lost > 0 && q.format == "json" {
			text = fmt.Sprintf("{\"lost\": %d}\n", a.Lost)
		} else if a.Lost > 0 {
			text = fmt.Sprintf("(%d lines are missing here: this reader was too slow)\n", a.Lost)
		}
		for _, u := range us {
			if wants(kinds, a.Kind, u.Event) {
				text += q.line(a, u)
				seen += min(int(a.Kind), 1)
			}
		}
		if err := output(text); err != nil || q.count == 0 || seen < q.count {
			return err
		}
		return io.EOF // enough
	})
	if err == nil && seen < q.count {
		err = trouble("", "the agent has ended: %d of %d events", seen, q.count)
	}
	return err
}

// line is one event.
func (q *ask) line(a answer, u update) string {
	at, m := time.Unix(0, a.At), u.Member
	fields := pairs{"name", u.Event, "payload", string(u.Payload), "ltime", u.LTime, "from", m.Name}
	what := fmt.Sprintf("%s %s", u.Event, u.Payload)
	if a.Kind < eventUser {
		fields = pairs{"name", m.Name, "addr", m.Addr.String(), "tags", tagPairs(m), "status", m.Status.String()}
		what = fmt.Sprintf("%s %s %s %s", m.Name, m.Addr, m.Status, strings.Join(m.Tags.pairs(), ","))
	}
	if q.format == "json" {
		return toJSON(append(pairs{"time", at.Format(time.RFC3339Nano), "event", a.Kind.String()}, fields...), "") + "\n"
	}
	return strings.TrimRight(fmt.Sprintf("%s %s: %s", at.Format("2006/01/02 15:04:05"), a.Kind, printable(what, "")), " ") + "\n"
}

// whom names the members to ask; nobody: all of them.
func (q *ask) whom() (names []string, err error) {
	conds, err := q.conditions()
	if err != nil || len(q.tags) == 0 {
		return q.nodes, err
	}
	_, names, err = q.chosen(conds, rpcTimeout)
	names = slices.DeleteFunc(names, func(name string) bool { return len(q.nodes) > 0 && !slices.Contains(q.nodes, name) })
	if err == nil && len(names) == 0 {
		err = errNobody
	}
	return names, err
}

func (q *ask) query(args []string) error {
	name, payload, began := args[0], []byte(strings.Join(args[1:], "")), time.Now()
	if err := checkPayload("query", name, payload); err != nil {
		return err
	}
	who, err := q.whom()
	if err != nil {
		return err
	}
	t := &tally{ask: q, acks: []any{}}
	req := request{Op: "query", Name: name, Payload: payload, Args: strings.Join(who, "\x00"), Within: q.within}
	err = q.call(req, rpcTimeout, func(a answer, us []update) error {
		if a.Text != "" {
			t.silent = list(a.Text)
			for _, node := range q.nodes {
				if len(q.tags) == 0 && !slices.Contains(t.silent, node) {
					t.silent = append(t.silent, node) // and will be: it is not there
				}
			}
			return t.say("Query '%s' dispatched\n", name)
		}
		for _, u := range us {
			if err := t.heard(a.Reply, u.Member.Name, string(u.Payload)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = t.sum()
	}
	switch silent := strings.Join(t.silent, ", "); {
	case err != nil || silent == "":
		return err
	case time.Since(began) < q.within:
		return trouble("'members' shows who is alive", "no answer from %s: not there, or not any more", silent)
	default:
		return trouble("", "no answer within %v from %s", q.within, silent)
	}
}

// tally is what has come of a query.
type tally struct {
	*ask
	silent              []string // asked, and no answer yet
	acks                []any
	responses, failures pairs
}

// say is for people, who want to see each answer as it comes.
func (t *tally) say(format string, a ...any) error {
	if t.format == "json" {
		return nil
	}
	return output(printable(fmt.Sprintf(format, a...), "\n\t"))
}

func (t *tally) heard(r reply, from, text string) error {
	if r != replyHeard {
		t.silent = slices.DeleteFunc(t.silent, func(name string) bool { return name == from })
	}
	if !t.noAck && !slices.Contains(t.acks, any(from)) { // a reply may overtake it
		t.acks = append(t.acks, from)
		if err := t.say("Ack from '%s'\n", from); err != nil {
			return err
		}
	}
	switch plain := strings.TrimSuffix(text, "\n"); {
	case r == replyDone:
		t.responses = append(t.responses, from, text)
		return t.say("Response from '%s': %s\n", from, plain)
	case r == replyFailed:
		t.failures = append(t.failures, from, text)
		return t.say("Failed on '%s': %s\n", from, plain)
	}
	return nil
}

// sum ends the output.
func (t *tally) sum() error {
	if t.format == "json" {
		result := pairs{"Acks", t.acks, "Responses", t.responses}
		if len(t.failures) > 0 {
			result = append(result, "Failures", t.failures)
		}
		return output(toJSON(result, "\n") + "\n")
	}
	acks := ""
	if !t.noAck {
		acks = fmt.Sprintf("Total Acks: %d\n", len(t.acks))
	}
	return t.say("%sTotal Responses: %d\n", acks, len(t.responses)/2)
}

// ---- the agent ----

// agent is what the agent's options say; some need checking as the user wrote them.
type agent struct {
	gossip                                                   gossipConfig
	handlers                                                 handlerConfig
	bind, advertise, iface, rpcAddr, rpcAuth, role, logLevel string
	tags, keys, seeds                                        []string
	leaveOnTerminate                                         bool
	log                                                      *log.Logger
}

const agentExamples = `  {} agent
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
`

func agentCommand() *command {
	a := &agent{bind: "0.0.0.0:" + defaultPort, rpcAddr: defaultRPC, logLevel: "info"}
	a.gossip.reapAfter, a.handlers.timeout, a.handlers.grace = 24*time.Hour, 10*time.Minute, handlerGrace
	c := &command{name: "agent", short: "runs a node until it is told to stop", examples: agentExamples, options: []option{
		{name: "The node"},
		{"node NAME", "its name, unique in the cluster (default: the host name)", &a.gossip.member.Name},
		{"role ROLE", "the same as -tag role=ROLE", &a.role},
		{"tag KEY=VALUE", "a tag that others see; repeatable", &a.tags},
		{name: "Addresses"},
		{"bind IP:PORT", "where to listen for gossip, UDP and TCP\n(default: 0.0.0.0:7946)", &a.bind},
		{"advertise HOST[:PORT]", "the address that others are told (default: the address\n" +
			"from which packets to the first seed go out)", &a.advertise},
		{"iface NAME", "advertise the address of this network interface", &a.iface},
		{"rpc-addr HOST:PORT", "where to listen for the other commands\n(default: " + defaultRPC + ")", &a.rpcAddr},
		{"rpc-auth TOKEN", "a token that the other commands must give", &a.rpcAuth},
		{name: "The cluster"},
		{"join HOST[:PORT]", "a node to join, tried until it answers; repeatable,\nor separated by commas", &a.seeds},
		{"retry-join", "", &a.seeds}, {"retry-interval", "", new(string)},
		{"retry-max N", "give up after N rounds of trying: 10 take one or two\n" +
			"minutes, each further one 30 s (default: never)", &a.gossip.retryMax},
		{"replay", "run handlers for the remembered events of before its\ntime, too", &a.gossip.replay},
		{"cluster NAME", "nodes with another cluster name are not let in", &a.gossip.cluster},
		{"encrypt KEY", "a key from '{} keygen': only nodes with the key can\n" +
			"read or join. Repeatable: the first seals, all can open.\n" +
			"Other users can see arguments: better set HAMLET_ENCRYPT", &a.keys},
		{"reap-after DURATION", "when failed and left members are forgotten\n(default: 24h)", &a.gossip.reapAfter},
		{"leave-on-terminate", "leave gracefully at SIGTERM, too", &a.leaveOnTerminate},
		{name: "Handlers"},
		{"event-handler SPEC", "a script to run on events; repeatable. SPEC is SCRIPT or\n" +
			"EVENT[,EVENT...]=SCRIPT; an EVENT is member-join,\n" +
			"member-leave, member-failed, member-update, member-reap,\n" +
			"user, user:NAME, query, query:NAME or * (all of them)", &a.handlers.specs},
		{"handler-timeout DURATION", "when a script is stopped (default: 10m)", &a.handlers.timeout},
		{name: "Log"},
		{"log-level LEVEL", "trace, debug, info, warn or err (default: info)", &a.logLevel},
	}}
	c.run = func([]string) error { return a.run(c) }
	return c
}

// check fills the configuration from what the user wrote and returns the reason
// for the advertised address.
func (a *agent) check() (why string, err error) {
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
	if old, ok := tags.asMap()["role"]; ok && a.role != "" && old != a.role {
		return "", misuse("give one of them", "-role %q and -tag role=%q differ", a.role, old)
	} else if err == nil && a.role != "" {
		tags, err = parseTags("-role", append(tags.pairs(), "role="+a.role))
	}
	if err != nil {
		return "", err
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
		} else if len(key) != keySize {
			return nil, fmt.Errorf("key %d of %d has %d bytes, a key has %d", i+1, len(list), len(key), keySize)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// run runs the agent that command c has made.
func (a *agent) run(c *command) error {
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
	a.log = log.New(logs, "", log.LstdFlags)
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
	a.handlers.env = func() []string {
		<-started
		self, alone := g.me()
		return handlerEnv(self, alone, loopbackFor(ln.Addr()), a.rpcAuth)
	}
	a.handlers.log, a.gossip.log = a.log, a.log
	handlers, err := newHandlers(a.handlers)
	if err != nil {
		return misuse(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.rpcPort = uint16(ln.Addr().(*net.TCPAddr).Port)
	a.gossip.events = handlers.deliver
	if g, err = startGossip(a.gossip); err != nil {
		return startFailure("gossip", "-bind", a.gossip.bind.String(), err)
	}
	close(started)
	self, _ := g.me()
	a.banner(self, why, ln.Addr())
	a.warnOfUnknown(c)
	logs.start()
	rpc := serveRPC(ln, g, a.rpcAuth, func() []string { return a.info(g, handlers) })
	ended := make(chan struct{})
	go func() { <-g.done; rpc.close(); handlers.close(g.last...); close(ended) }()
	return a.wait(g, ended, signals)
}

func listenRPC(addr string) (net.Listener, error) {
	host, port, err := hostPort(addr, defaultRPCPort)
	if err != nil {
		return nil, misuse("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	network := "tcp"
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		network = "tcp4" // or 0.0.0.0 would take IPv6 as well
	}
	addr = net.JoinHostPort(host, port)
	ln, err := net.Listen(network, addr)
	if err != nil {
		err = startFailure("the RPC", "-rpc-addr", addr, err)
	}
	return ln, err
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

// banner tells how the agent can be reached, and warns of what is hardly meant.
func (a *agent) banner(self Member, why string, rpc net.Addr) {
	bind, keyed := a.gossip.bind, len(a.gossip.keys) > 0
	if bind.Port() == 0 {
		bind = netip.AddrPortFrom(bind.Addr(), self.Addr.Port())
	}
	fmt.Printf(`==> Starting hamlet agent...
==> Starting hamlet agent RPC...
==> hamlet agent running!
    Node name: '%s'
    Bind addr: '%s'
    Advertise: '%s' (%s)
     RPC addr: '%s'
    Encrypted: %v
`, self.Name, bind, self.Addr, why, rpc, keyed)
	switch ip := self.Addr.Addr(); {
	case why == noAddress:
		a.log.Printf("[WARN] advertising %s, which other machines cannot reach: %s (-advertise sets one)", self.Addr, why)
	case !keyed && !ip.IsPrivate() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast():
		a.log.Printf("[WARN] %s is a public address, and there is no key: "+
			"whoever reaches it can join and lie (-encrypt sets one)", self.Addr)
	}
	switch {
	case rpc.(*net.TCPAddr).IP.IsLoopback():
	case a.rpcAuth == "":
		a.log.Printf("[WARN] the RPC listens on %s without a token: whoever reaches it controls this agent "+
			"(-rpc-auth sets one)", rpc)
	default:
		a.log.Printf("[WARN] the RPC listens on %s: whoever has the token controls this agent from elsewhere", rpc)
	}
}

// warnOfUnknown tells of variables that are meant for the agent and are no option of command c.
func (a *agent) warnOfUnknown(c *command) {
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		known := func(o option) bool { return o.value != nil && c.env(o)[0] == name }
		if strings.HasPrefix(name, "HAMLET_") && !slices.ContainsFunc(c.options, known) {
			a.log.Printf("[WARN] there is no option %s: it is not looked at", name)
		}
	}
}

// info is what the agent knows of itself, as text and as JSON.
func (a *agent) info(g *gossip, handlers *handlers) []string {
	self, _ := g.me()
	var events, about pairs
	add := func(key string, value any) {
		for n, plain := 2, key; slices.Contains(events, any(key)); n++ { // no JSON should hold a key twice
			key = fmt.Sprintf("%s (%d)", plain, n)
		}
		events = append(events, key, value)
	}
	for _, h := range handlers.all {
		waiting, lost, last := h.state()
		for _, ev := range h.events { // as Serf has it
			kind, name, _ := strings.Cut(ev, ":")
			add(kind+":"+name, fmt.Sprintf("%.1000s", h.script)) // or many would fill more than a frame
		}
		of := strings.Join(h.events, ",")
		add(of+" waiting", waiting)
		add(of+" dropped", lost)
		add(of+" last run", last)
	}
	g.do(func(n *node) error { about = n.info(); return nil })
	all := pairs{
		"agent", pairs{"name", self.Name, "addr", self.Addr, "version", version, "uptime", time.Since(g.start).Round(time.Second)},
		"event_handlers", events,
		"runtime", pairs{"arch", runtime.GOARCH, "cpu_count", runtime.NumCPU(), "goroutines", runtime.NumGoroutine(),
			"max_procs", runtime.GOMAXPROCS(0), "os", runtime.GOOS, "version", runtime.Version()},
		"serf", append(pairs{"encrypted", len(a.gossip.keys) > 0}, about...),
		"tags", tagPairs(self),
	}
	text := ""
	for group := range slices.Chunk(all, 2) {
		text += fmt.Sprintf("%s:\n", group[0])
		for fact := range slices.Chunk(group[1].(pairs), 2) {
			fact[1] = fmt.Sprint(fact[1])
			text += fmt.Sprintf("\t%s = %s\n", printable(fact[0].(string), ""), printable(fact[1].(string), ""))
		}
	}
	return []string{text, toJSON(all, "\n") + "\n"}
}

// wait returns when the agent has ended: told by a signal, by the leave
// command, or by itself.
func (a *agent) wait(g *gossip, ended <-chan struct{}, signals <-chan os.Signal) error {
	var told time.Time // to stop
	for {
		var s os.Signal
		select {
		case <-ended:
			if errors.Is(g.err, errTaken) {
				return trouble("choose another name with -node", "%v", g.err)
			}
			return g.err
		case s = <-signals:
		}
		switch {
		case s == syscall.SIGHUP: // Serf would read its configuration again
			a.log.Printf("[INFO] hangup: there is no configuration to reload, carrying on")
			continue
		case time.Since(told) < sameSignal:
			continue
		case !told.IsZero():
			return trouble("", "%v while stopping: ended at once", s)
		}
		told = time.Now()
		if s == os.Interrupt || s == syscall.SIGTERM && a.leaveOnTerminate {
			a.log.Printf("[INFO] %v: leaving the cluster, a second signal ends at once", s)
			go func() {
				if err := g.leave(); err != nil {
					a.log.Printf("[WARN] leave: %v", err)
				}
			}()
		} else { // peers notice at once; handlers get their grace
			a.log.Printf("[INFO] %v: ending without leaving", s)
			g.close()
		}
	}
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

func checkAddrs(what string, addrs []string) error {
	for _, s := range addrs {
		if host, port, err := hostPort(s, defaultPort); err != nil || host == "" || port == "0" {
			return misuse("an address is HOST or HOST:PORT, such as 10.0.2.15:7946 or [2001:db8::7]:7946",
				"%s: %q is not an address", what, s)
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

// resolve looks up all addresses of all hosts at the same time; a host without
// a port means 7946. What takes longer than 1.5 s counts as failed.
func resolve(ctx context.Context, hosts []string) (addrs []netip.AddrPort, errs []string) {
	ctx, cancel := context.WithTimeout(ctx, resolveFor)
	defer cancel()
	found, failed := make([][]netip.AddrPort, len(hosts)), make([]error, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() { found[i], failed[i] = resolveOne(ctx, h, defaultPort) })
	}
	wg.Wait()
	for i, err := range failed {
		if err != nil {
			errs = append(errs, fmt.Sprintf("%s: %v", hosts[i], err))
		}
		for _, a := range found[i] {
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs, errs
}

// resolveOne looks up all addresses of one host; port stands in for a missing one.
func resolveOne(ctx context.Context, s, port string) (addrs []netip.AddrPort, err error) {
	host, port, err := hostPort(s, port)
	if err != nil {
		return nil, err
	}
	p, _ := strconv.ParseUint(port, 10, 16)
	ips, err := net.DefaultResolver.LookupIPAddr(ctx, host) // LookupNetIP would lose an address's zone
	for _, ip := range ips {
		a := (&net.UDPAddr{IP: ip.IP, Port: int(p), Zone: ip.Zone}).AddrPort()
		addrs = append(addrs, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
	}
	return addrs, err
}

// loopbackFor returns an address at which this machine reaches a listener.
func loopbackFor(a net.Addr) string {
	if tcp := a.(*net.TCPAddr); tcp.IP.IsUnspecified() {
		return fmt.Sprintf("127.0.0.1:%d", tcp.Port)
	}
	return a.String()
}

// advertised returns the address that others are told, and the reason.
func (a *agent) advertised() (addr netip.AddrPort, why string, err error) {
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
func chooseAdvertise(bind netip.AddrPort, seeds []string) (addr netip.AddrPort, why string) {
	if !bind.Addr().IsUnspecified() {
		return bind, "the bound address"
	}
	try := func(ip netip.Addr, reason string) {
		if !addr.IsValid() && usable(ip, bind.Addr()) {
			addr, why = netip.AddrPortFrom(ip, bind.Port()), reason
		}
	}
	found, _ := resolve(context.Background(), seeds)
	for _, seed := range found {
		try(sourceTo(seed.Addr()), fmt.Sprintf("source address of the route to %s", seed.Addr()))
	}
	for _, far := range []string{"198.51.100.1", "2001:db8::1"} { // reserved for documentation, so never near
		try(sourceTo(netip.MustParseAddr(far)), "source address of the default route")
	}
	ifcs, _ := net.Interfaces()
	for _, ifc := range ifcs {
		if ifc.Flags&net.FlagUp != 0 {
			try(ifaceAddr(&ifc, bind.Addr()), "address of "+ifc.Name)
		}
	}
	switch {
	case addr.IsValid():
		return addr, why
	case bind.Addr().Is4():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), bind.Port()), noAddress
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), bind.Port()), noAddress
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
