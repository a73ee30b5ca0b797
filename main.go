// main.go: what a user types and sees: the commands with their options, help, output and errors, addresses, the
// log, and the wiring of an agent.

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
	"math"
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
)

var version = "0.1.0" // the Makefile sets it

var prog = filepath.Base(os.Args[0]) // the name that the program was called by

const (
	defaultPort    = "7946"
	defaultRPCPort = "7373"
	defaultRPC     = "127.0.0.1:" + defaultRPCPort
	keySize        = 32
	rpcTimeout     = 5 * time.Second
	slowTimeout    = 20 * time.Second // a join or a leave takes the agent itself up to fifteen
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

// failf is a failure of what was asked for, misuse one of how.
func failf(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 1}
}

func usagef(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 2}
}

func main() {
	if err := execute(append(os.Args[1:], "")[0], os.Args[min(2, len(os.Args)):]); err != nil {
		exit(err)
	}
}

// exit tells err, and ends the program.
func exit(err error) {
	f, _ := errors.AsType[*failure](err)
	f = cmp.Or(f, &failure{code: 1})
	fmt.Fprintf(os.Stderr, "%s: error: %s\n", prog, printable(err.Error(), "\n\t"))
	if f.hint != "" {
		fmt.Fprintf(os.Stderr, "hint: %s\n", printable(f.hint, "\n\t"))
	}
	os.Exit(f.code)
}

func execute(name string, args []string) error {
	switch name {
	case "":
		return cmp.Or(output(help()), usagef("", "no command given"))
	case "help", "-h", "-help", "--help":
		if len(args) == 0 || args[0] == "help" {
			return output(help())
		}
		name, args = args[0], []string{"-h"}
	case "-v", "-version", "--version":
		name = "version"
	}
	for _, c := range commands {
		if c.name == name {
			return c.execute(args)
		}
	}
	hint := fmt.Sprintf("'%s help' lists the commands; '%s agent' starts a node", prog, prog)
	return cmp.Or(serfWord(name), usagef(hint, "there is no command %q", name))
}

// ---- commands and options ----

// command is one command; its options and its run share variables.
type command struct {
	name, args, short string
	examples          string // {} stands for the program's name
	options           options
	run               func(*flag.FlagSet) error
}

type options []func(*flag.FlagSet)

// One command runs in a process: these take its options.
var (
	theAgent  = &agent{tags: make(map[string]string)}
	theClient = &client{filter: make(filter), tags: make(map[string]string)}
)

// commands are all commands, in the order in which help lists them.
var commands = []*command{
	{"agent", "", "runs a node until it is told to stop", `  {} agent
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
`, options{theAgent.options}, theAgent.run},
	{"members", "", "lists the members of the cluster", `  {} members                                list all members
  {} members -status alive -tag role=web    the living ones with a tag
  {} members -name 'db[0-9]+' -format json
  {} members -wait 3 -timeout 20s           wait until three are alive
`, options{theClient.rpcOptions, theClient.formatOption, func(fs *flag.FlagSet) {
		fs.Func("status", "only those of status `RE`: alive, leaving, left or failed", theClient.filter.set("status="))
		fs.Func("name", "only those whose name matches `RE`, a regular expression, as a whole", theClient.filter.set("name="))
		fs.Func("tag", "only those with such a tag, `KEY=RE`; repeatable", theClient.filter.set("tag "))
		fs.Func("role", "the same as -tag role=`RE`", theClient.filter.set("tag role="))
		fs.Bool("detailed", false, "has no effect: it is Serf's")
		fs.Func("wait", "wait until `N` of those listed are alive, even for the agent to start;\n"+
			"exit status 1 if it took too long", number(&theClient.count))
		fs.Func("timeout", "the `DURATION` to wait (default: for ever)", duration(&theClient.timeout))
	}}, theClient.members},
	{"watch", "", "shows who is there, and then what happens, as it happens", `  {} watch
  {} watch -event member-failed,user:deploy
  {} watch -format json      one object a line, for programs
  {} watch -event user:done -n 1 -timeout 60s   wait for an event
`, options{theClient.rpcOptions, theClient.formatOption, func(fs *flag.FlagSet) {
		fs.StringVar(&theClient.events, "event", "*", "what to show, `EVENT[,EVENT...]` as in -event-handler; 'member' is\n"+
			"who is there at the start")
		fs.Func("n", "end after `N` events, not counting who is there at first", number(&theClient.count))
		fs.Func("timeout", "with -n: exit status 1 if it takes longer, a `DURATION`", duration(&theClient.timeout))
	}}, theClient.watch},
	{"query", "NAME [PAYLOAD]", "asks members; their handlers' output is the answer", `  {} query load
  {} query -tag role=db master
  {} query -node web1 -node web2 -timeout 3s -format json health
`, options{theClient.rpcOptions, theClient.formatOption, func(fs *flag.FlagSet) {
		theClient.Timeout = 15 * time.Second
		fs.Func("node", "ask only the member `NAME`; repeatable", func(name string) error {
			theClient.nodes = append(theClient.nodes, name)
			return validName(name) // an empty one would be nobody, and so ask all
		})
		fs.Func("tag", "ask only those with such a tag, `KEY=RE`; repeatable", theClient.filter.set("tag "))
		fs.Func("timeout", "the `DURATION` to wait for the slowest (default 15s)", duration(&theClient.Timeout))
		fs.BoolVar(&theClient.noAck, "no-ack", false, "do not show who has the query")
	}}, theClient.query},
	{"info", "", "shows what the agent knows of itself", "  {} info\n  {} info -format json\n",
		options{theClient.rpcOptions, theClient.formatOption}, func(fs *flag.FlagSet) error { return theClient.doAndPrint(fs, rpcTimeout, "") }},
	{"tags", "", "changes the tags of the running agent", `  {} tags -set state=drain
  {} tags -set health=ok -set zone=b -delete state
`, options{theClient.rpcOptions, func(fs *flag.FlagSet) {
		fs.Func("set", "set the tag `KEY=VALUE`; repeatable", setTag(theClient.tags, ""))
		fs.Func("delete", "remove the tag `KEY`; repeatable", func(key string) error {
			if key == "" || strings.Contains(key, "=") {
				return errors.New("want KEY, such as state")
			}
			theClient.DeleteTags = strings.TrimPrefix(theClient.DeleteTags+"\x00"+key, "\x00")
			return nil
		})
	}}, theClient.setTags},
	{"event", "NAME [PAYLOAD]", "sends a user event to the handlers of every member", `  {} event deploy
  {} event deploy 3f2c1aa       with a payload, the handlers' input
  {} event -coalesce=false log "$(uptime)"
`, options{theClient.rpcOptions, func(fs *flag.FlagSet) {
		fs.BoolVar(&theClient.Coalesce, "coalesce", true, "of events of one name that wait, run only the last")
	}}, func(fs *flag.FlagSet) error {
		done := fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(fs.Arg(0), ""), theClient.Coalesce)
		return theClient.doAndPrint(fs, rpcTimeout, done)
	}},
	{"join", "ADDR...", "makes the agent join the cluster of another node", `  {} join 10.0.2.15
  {} join 10.0.2.15:7946 node2.example.com '[2001:db8::7]:7946'
`, options{theClient.rpcOptions, func(fs *flag.FlagSet) {
		fs.BoolVar(&theClient.Replay, "replay", false, "run handlers for the remembered events of that cluster")
	}}, theClient.join},
	{"leave", "", "makes the agent leave the cluster and stop", "  {} leave\n", options{theClient.rpcOptions},
		func(fs *flag.FlagSet) error {
			return theClient.doAndPrint(fs, slowTimeout, "Graceful leave complete\n")
		}},
	{"force-leave", "NAME", "turns a failed member into one that left",
		`  {} force-leave web3           a failed member counts as left, everywhere
  {} force-leave -prune web3    it vanishes from the list
`, options{theClient.rpcOptions, func(fs *flag.FlagSet) {
			fs.BoolVar(&theClient.Prune, "prune", false, "forget the member altogether")
		}}, func(fs *flag.FlagSet) error { return theClient.doAndPrint(fs, rpcTimeout, "") }},
	{"keygen", "", "prints a new key for -encrypt", "  {} keygen\n  HAMLET_ENCRYPT=$({} keygen) {} agent\n", nil,
		func(*flag.FlagSet) error {
			key := make([]byte, keySize)
			rand.Read(key) // never fails
			return output(base64.StdEncoding.EncodeToString(key) + "\n")
		}},
	{"version", "", "prints the version", "  {} version\n", nil,
		func(*flag.FlagSet) error {
			return output(fmt.Sprintf("hamlet %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH))
		}},
}

// execute sets the options from args, and runs the command.
func (c *command) execute(args []string) error {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard) // errors are told by exit
	for _, define := range c.options {
		define(fs)
	}
	err := cmp.Or(fs.Parse(args), c.checkArgs(fs))
	_, unknown, _ := strings.Cut(fmt.Sprint(err), "not defined: ")
	switch {
	case errors.Is(err, flag.ErrHelp):
		return output(c.help(fs))
	case err != nil:
		return cmp.Or(serfWord(unknown), wrongUsage(c.name, err))
	}
	if c.name != "agent" { // which has its own way with signals
		quit := make(chan os.Signal, 1)
		signal.Notify(quit, syscall.SIGQUIT) // Go would print stacks
		go func() { <-quit; os.Exit(128 + int(syscall.SIGQUIT)) }()
	}
	return c.run(fs)
}

// checkArgs compares the arguments with what the command takes: WORD, [WORD] or WORD...
func (c *command) checkArgs(fs *flag.FlagSet) error {
	takes := strings.Fields(c.args)
	if fs.NArg() == 0 && len(takes) > 0 {
		return fmt.Errorf("%s is missing", c.args)
	}
	for i, arg := range fs.Args() {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if strings.HasPrefix(arg, "-") && fs.Lookup(name) != nil {
			return fmt.Errorf("%q stands behind the arguments: options come before the name", arg)
		} else if i >= len(takes) && !strings.HasSuffix(c.args, "...") {
			if _, err := parseKeys(strings.Split(arg, ",")); err == nil {
				arg = "(a key)" // which is never shown
			}
			return fmt.Errorf("unexpected argument %q", arg)
		}
	}
	return nil
}

func wrongUsage(command string, err error) error {
	text := strings.Replace(err.Error(), "parse error", "want true or false", 1) // as package flag says it of a bool
	return usagef(fmt.Sprintf("'%s help %s' shows how to use it", prog, command), "%s: %s", command, text)
}

// serfWords is what to do instead of what Serf has and hamlet has not.
var serfWords = map[string]string{
	"-snapshot -rejoin":        "nothing is kept on disk: a restarted agent finds its cluster by -join, or is found",
	"-config-file -config-dir": "options come from flags or from HAMLET_ variables, such as HAMLET_JOIN",
	"-profile":                 "there is one timing, for LAN and WAN alike",
	"-discover -mdns-iface -mdns-disable-ipv4 -mdns-disable-ipv6": "name the seeds with -join: one DNS name will do",
	"-keyring-file": "give each key with -encrypt or HAMLET_ENCRYPT: the first seals, any opens",
	"-tags-file":    "give tags with -tag or HAMLET_TAG, and change them with the tags command",
	"-syslog":       "the log goes to stderr: let systemd or 'logger' take it",
	"-protocol -broadcast-timeout -disable-compression -relay-factor": "leave it out: there is nothing of it to set",
	"keys":         "restart the agents one by one with -encrypt OLD,NEW, then NEW,OLD, then NEW",
	"reachability": "every member is looked at all the time: see 'members' and 'info'",
	"rtt":          "there are no network coordinates: use ping",
	"monitor":      "'watch' streams events, and the log is the agent's stderr",
}

// serfWord is the error for a word of Serf's; nil: it is none.
func serfWord(word string) error {
	for words, advice := range serfWords {
		if slices.Contains(strings.Fields(words), word) {
			return usagef("", "%s has no %s: %s", prog, word, advice)
		}
	}
	return nil
}

func help() string {
	text := `  {} agent                     start a node on this machine
  {} agent -join 10.0.2.15     start one that joins the cluster of that host
  {} agent -log-level=debug -event-handler=./handler.sh
                                   run a script when members come and go
  {} members                   list the members of the cluster
  {} leave                     leave the cluster and stop the agent

Commands:
`
	for _, c := range commands {
		text += fmt.Sprintf("  %-12s %s\n", c.name, c.short)
	}
	text += "\n'{} help COMMAND' shows how to use a command, and its options.\n"
	return strings.ReplaceAll(text, "{}", prog)
}

func (c *command) help(fs *flag.FlagSet) string {
	var b strings.Builder
	fs.SetOutput(&b)
	fs.PrintDefaults()
	usage, list := c.name, b.String()
	if list != "" {
		usage, list = usage+" [OPTION...]", "\n"+list
	}
	text := c.examples + "\nUsage: {} " + strings.TrimSpace(usage+" "+c.args) + "\n" + list
	return strings.ReplaceAll(text, "{}", prog)
}

// number, duration and setTag, and set of a filter, make what takes the text of an option.
func number(n *int) func(string) error {
	return func(s string) error {
		u, err := strconv.ParseUint(s, 10, 31)
		if *n = int(u); err != nil {
			return errors.New("want a number, 0 or more")
		}
		return nil
	}
}

func duration(d *time.Duration) func(string) error {
	return func(s string) (err error) {
		if *d, err = time.ParseDuration(s); err != nil || *d <= 0 {
			return errors.New("want a duration, such as 500ms, 20s or 10m")
		}
		return nil
	}
}

// setTag returns the way to take KEY=VALUE, or what is missing of it after a prefix.
func setTag(tags map[string]string, prefix string) func(string) error {
	return func(s string) error {
		k, v, ok := strings.Cut(prefix+s, "=")
		if !ok {
			return errors.New("want KEY=VALUE, such as role=web")
		} else if old := cmp.Or(tags[k], v); k == "role" && old != v {
			return fmt.Errorf("the role is %q already", old)
		}
		tags[k] = v
		return nil
	}
}

// ---- output ----

// output writes to stdout; a full disk or a closed pipe is an error.
func output(text string) error {
	if _, err := os.Stdout.WriteString(text); err != nil {
		return failf("", "cannot write the output: %v", reason(err))
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

// printable makes text from elsewhere safe to show: whatever is not graphic (escape sequences, bidi marks, broken
// UTF-8) is shown as in Go source, except for the characters in keep.
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

// toJSON lays v out as Serf does, where nl is what begins a line, or (nl "") in one line. Not with encoding/json:
// that leaves DEL and the C1 controls as they are, and a terminal would obey them.
func toJSON(v any, nl string) string {
	inner, brackets := strings.Replace(nl, "\n", "\n  ", 1), "[]"
	var items []string
	switch v := v.(type) {
	case string:
		return jsonString(v)
	case []any:
		for _, x := range v {
			items = append(items, toJSON(x, inner))
		}
	case pairs:
		brackets = "{}"
		for kv := range slices.Chunk(v, 2) {
			items = append(items, jsonString(kv[0].(string))+": "+toJSON(kv[1], inner))
		}
	default:
		return fmt.Sprint(v)
	}
	if len(items) == 0 {
		return brackets
	}
	return brackets[:1] + inner + strings.Join(items, ","+cmp.Or(inner, " ")) + nl + brackets[1:]
}

func jsonString(s string) string {
	var b strings.Builder
	for _, r := range strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\n", `\n`).Replace(s) {
		if unicode.IsGraphic(r) {
			b.WriteRune(r) // broken UTF-8 has become U+FFFD
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&b, `\u%04x`, u)
		}
	}
	return `"` + b.String() + `"`
}

// ---- the commands that ask a running agent ----

// client is what a command asks of its agent, and how its user wants to see the answer.
type client struct {
	rpcRequest
	addr, token string // of the agent's RPC
	filter      filter
	tags        map[string]string // to set
	nodes       []string          // to ask
	events      string            // to show
	count       int               // how many members, or events, to wait for
	timeout     time.Duration
	noAck       bool
}

func (q *client) rpcOptions(fs *flag.FlagSet) {
	variable := func(name string) string { return cmp.Or(os.Getenv("SERF_"+name), os.Getenv("HAMLET_"+name)) }
	fs.StringVar(&q.addr, "rpc-addr", cmp.Or(variable("RPC_ADDR"), defaultRPC),
		"`HOST:PORT` of its RPC, or SERF_RPC_ADDR")
	fs.StringVar(&q.token, "rpc-auth", "", "the `TOKEN` that it asks for, or SERF_RPC_AUTH")
	q.token = variable("RPC_AUTH") // and no default, which help would show
}

func (q *client) formatOption(fs *flag.FlagSet) {
	fs.Func("format", "`FORMAT` of the output: text or json (default text)", func(s string) error {
		if q.JSON = s == "json"; !q.JSON && s != "text" {
			return errors.New("want text or json")
		}
		return nil
	})
}

func (q *client) call(op string, timeout time.Duration, each func(rpcResponse, []update) error) error {
	addr, err := rpcAddr(q.addr)
	if q.Op = op; err != nil {
		return err
	}
	return callRPC(addr, q.token, q.rpcRequest, timeout, each)
}

// doAndPrint has the agent do what the command is called, and shows the text of the answer or, where there is none, that it
// is done.
func (q *client) doAndPrint(fs *flag.FlagSet, timeout time.Duration, done string) error {
	q.Name, q.Payload = fs.Arg(0), []byte(fs.Arg(1))
	return q.call(fs.Name(), timeout, func(a rpcResponse, _ []update) error {
		return output(cmp.Or(printable(a.Text, "\n\t"), done))
	})
}

func (q *client) join(fs *flag.FlagSet) error {
	if err := checkAddrs(fs.Args()); err != nil {
		return usagef("", "join: %v", err)
	}
	q.Args = strings.Join(fs.Args(), "\x00")
	return q.call("join", slowTimeout, func(a rpcResponse, _ []update) error {
		return output(fmt.Sprintf("Successfully joined cluster by contacting %d nodes.\n", a.Count))
	})
}

func (q *client) setTags(fs *flag.FlagSet) error {
	tags, err := makeTags(q.tags)
	if q.Args = string(tags); err != nil {
		return usagef("", "-set: %v", err)
	} else if q.Args+q.DeleteTags == "" {
		return usagef("for example: -set state=drain", "nothing to change: give -set or -delete")
	}
	return q.doAndPrint(fs, rpcTimeout, "Successfully updated agent tags\n")
}

// filter is what members must match, by field: "name", "status", or a tag as "tag KEY".
type filter map[string]*regexp.Regexp

// set returns the way to take FIELD=RE, or what is missing of it after a prefix.
func (f filter) set(prefix string) func(string) error {
	return func(s string) error {
		field, re, ok := strings.Cut(prefix+s, "=")
		if !ok {
			return errors.New("want KEY=RE, such as role=web")
		}
		r, err := regexp.Compile("^(?s:" + re + ")$")
		if se, ok := errors.AsType[*syntax.Error](err); ok {
			return fmt.Errorf("%q is not a regular expression: %s", re, se.Code)
		}
		f[field] = r
		return nil
	}
}

func (f filter) matches(m Member) bool {
	fields := map[string]string{"name": m.Name, "status": m.Status.String()}
	for k, v := range m.Tags.asMap() {
		fields["tag "+k] = v
	}
	for field, re := range f {
		if v, ok := fields[field]; !ok || !re.MatchString(v) {
			return false
		}
	}
	return true
}

// matchingMembers asks for the members that are meant; living are the names of those that are alive.
func (q *client) matchingMembers(timeout time.Duration) (ms []Member, living []string, err error) {
	err = q.call("members", timeout, func(_ rpcResponse, us []update) error {
		for _, u := range us {
			m := u.Member
			if !q.filter.matches(m) || len(q.nodes) > 0 && !slices.Contains(q.nodes, m.Name) {
				continue
			}
			if ms = append(ms, m); m.Status == statusAlive {
				living = append(living, m.Name)
			}
		}
		return nil
	})
	return ms, living, err
}

func (q *client) members(*flag.FlagSet) error {
	switch status := q.filter["status"]; {
	case q.timeout > 0 && q.count == 0:
		return usagef("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
	case q.count > 0 && status != nil && !status.MatchString(statusAlive.String()):
		return usagef("", "-wait counts the living, and -status leaves them out")
	}
	const pause = 100 * ms
	deadline := time.Now().Add(cmp.Or(q.timeout, math.MaxInt64))
	for few := error(nil); ; time.Sleep(pause) { // few is what the last answer lacked
		ms, living, err := q.matchingMembers(min(rpcTimeout, max(time.Until(deadline), pause)))
		f, _ := errors.AsType[*failure](err)
		switch {
		case err == nil && len(living) >= q.count && q.JSON:
			return output(membersJSON(ms))
		case err == nil && len(living) >= q.count:
			return output(membersText(ms))
		case err == nil:
			few = failf("", "%d of %d members alive after %v: %s", len(living), q.count, q.timeout,
				cmp.Or(strings.Join(living, ", "), "none"))
		case q.count == 0 || f == nil || !f.again:
			return err
		}
		if time.Until(deadline) <= pause {
			return cmp.Or(few, err)
		}
	}
}

// membersText makes columns at least four blanks apart. The third is never narrower than "failed", so that tags
// stay in place when a member fails.
func membersText(ms []Member) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 4, ' ', 0)
	for _, m := range ms {
		tags := printable(strings.Join(splitNUL(m.Tags), ","), "")
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
	for _, tag := range splitNUL(m.Tags) {
		k, v, _ := strings.Cut(tag, "=")
		kv = append(kv, k, v)
	}
	return kv
}

func (q *client) watch(*flag.FlagSet) error {
	kinds, there := strings.Split(q.events, ","), eventNames[0]
	err := checkEvents(slices.DeleteFunc(slices.Clone(kinds), func(ev string) bool { return ev == there }))
	switch {
	case err != nil:
		return usagef(fmt.Sprintf("'%s help watch' shows some", prog), "-event: %v", err)
	case q.timeout > 0 && q.count == 0:
		return usagef("for example: -n 1 -timeout 60s", "-timeout needs -n N")
	case q.count > 0 && q.events == there:
		return usagef("", "-n counts events, and %q is none: it is who is there at the start", there)
	case q.timeout > 0:
		time.AfterFunc(q.timeout, func() { exit(failf("", "fewer than %d events within %v", q.count, q.timeout)) })
	}
	seen := 0
	err = q.call("watch", rpcTimeout, func(a rpcResponse, us []update) error {
		text := ""
		if a.Dropped > 0 && q.JSON {
			text = fmt.Sprintf("{\"lost\": %d}\n", a.Dropped)
		} else if a.Dropped > 0 {
			text = fmt.Sprintf("(%d lines are missing here: this reader was too slow)\n", a.Dropped)
		}
		for _, u := range us {
			if matches(kinds, a.Kind, u.Name) {
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
		err = failf("", "the agent has ended: %d of %d events", seen, q.count)
	}
	return err
}

func (q *client) line(a rpcResponse, u update) string {
	at, m := time.Unix(0, a.At), u.Member
	fields := pairs{"name", u.Name, "payload", string(u.Payload), "ltime", u.LTime, "from", m.Name}
	what := fmt.Sprintf("%s %s", u.Name, u.Payload)
	if a.Kind < eventUser {
		fields = pairs{"name", m.Name, "addr", m.Addr.String(), "tags", tagPairs(m), "status", m.Status.String()}
		what = fmt.Sprintf("%s %s %s %s", m.Name, m.Addr, m.Status, strings.Join(splitNUL(m.Tags), ","))
	}
	if q.JSON {
		return toJSON(append(pairs{"time", at.Format(time.RFC3339Nano), "event", a.Kind.String()}, fields...), "") + "\n"
	}
	return strings.TrimRight(fmt.Sprintf("%s %s: %s", at.Format("2006/01/02 15:04:05"), a.Kind, printable(what, "")), " ") + "\n"
}

// query asks the members that are meant; with neither filter nor nodes that is all of them.
func (q *client) query(fs *flag.FlagSet) error {
	who := q.nodes
	if len(q.filter) > 0 {
		_, living, err := q.matchingMembers(rpcTimeout)
		if who = living; err != nil || len(who) == 0 {
			return cmp.Or(err, errNobodyAsked)
		}
	}
	q.Name, q.Payload, q.Args = fs.Arg(0), []byte(fs.Arg(1)), strings.Join(who, "\x00")
	t := &queryResult{client: q}
	err := q.call("query", rpcTimeout, t.hear)
	if err == nil && len(t.silent) > 0 {
		err = failf("'members' shows who is alive; -timeout sets how long to wait", "no answer from %s",
			strings.Join(t.silent, ", "))
	}
	return err
}

// queryResult is what has come of a query.
type queryResult struct {
	*client
	silent       []string // asked, and no answer yet
	acks         []any
	done, failed pairs // the output of handlers that did well, and of those that failed
}

// hear takes an answer in, and shows it: to people each as it comes, to programs all with the last.
func (t *queryResult) hear(a rpcResponse, us []update) error {
	text := ""
	if a.Text != "" { // who is there of those asked; whoever was named and is not there stays silent
		text = fmt.Sprintf("Query '%s' dispatched\n", t.Name)
		t.silent = slices.Compact(slices.Sorted(slices.Values(splitNUL(cmp.Or(t.Args, a.Text)))))
	}
	for _, u := range us {
		from, said := u.Member.Name, string(u.Payload)
		if !t.noAck && !slices.Contains(t.acks, any(from)) { // a reply may overtake it
			t.acks = append(t.acks, from)
			text += fmt.Sprintf("Ack from '%s'\n", from)
		}
		switch a.Reply {
		case replyAck:
			continue
		case replyDone:
			t.done = append(t.done, from, said)
			text += fmt.Sprintf("Response from '%s': %s\n", from, strings.TrimSuffix(said, "\n"))
		case replyFailed:
			t.failed = append(t.failed, from, said)
			text += fmt.Sprintf("Failed on '%s': %s\n", from, strings.TrimSuffix(said, "\n"))
		}
		t.silent = slices.DeleteFunc(t.silent, func(name string) bool { return name == from })
	}
	switch {
	case t.JSON && a.More:
		return nil
	case t.JSON:
		result := pairs{"Acks", t.acks, "Responses", t.done}
		if len(t.failed) > 0 {
			result = append(result, "Failures", t.failed)
		}
		text = toJSON(result, "\n") + "\n"
	case !a.More:
		if !t.noAck {
			text += fmt.Sprintf("Total Acks: %d\n", len(t.acks))
		}
		text += fmt.Sprintf("Total Responses: %d\n", len(t.done)/2)
	}
	return output(printable(text, "\n\t"))
}

// ---- the agent ----

// agent is what the agent's options say; some need checking as the user wrote them.
type agent struct {
	gossip                     gossipConfig
	handlers                   handlerConfig
	bind, advertise, iface     string
	rpcAddr, rpcAuth, logLevel string
	keys                       []string
	tags                       map[string]string
	leaveOnTerminate           bool
}

func (a *agent) options(fs *flag.FlagSet) {
	g, h := &a.gossip, &a.handlers
	g.reapAfter, h.timeout, h.grace = 24*time.Hour, 10*time.Minute, 3*time.Second
	fs.StringVar(&g.member.Name, "node", "", "its `NAME`, unique in the cluster (default: the host name)")
	fs.Func("role", "the same as -tag role=`ROLE`", setTag(a.tags, "role="))
	fs.Func("tag", "a tag `KEY=VALUE` that others see; repeatable", setTag(a.tags, ""))
	fs.StringVar(&a.bind, "bind", "0.0.0.0:"+defaultPort, "`IP:PORT` where to listen for gossip, UDP and TCP")
	fs.StringVar(&a.advertise, "advertise", "", "the address that others are told, `HOST[:PORT]` (default: the one\n"+
		"from which packets to the first seed go out)")
	fs.StringVar(&a.iface, "iface", "", "advertise the address of the network interface `NAME`")
	fs.StringVar(&a.rpcAddr, "rpc-addr", defaultRPC, "`HOST:PORT` of the RPC, for the other commands")
	fs.StringVar(&a.rpcAuth, "rpc-auth", "", "a `TOKEN` that the other commands must give")
	fs.Func("join", "a node to join, `HOST[:PORT]`, tried until it answers; repeatable, or\nseparated by commas", a.seed)
	fs.Func("retry-join", "the same as -join `HOST[:PORT]`; repeatable", a.seed)
	fs.String("retry-interval", "", "`DURATION` has no effect: it is Serf's")
	fs.Func("retry-max", "give up after `N` rounds of trying: 10 take one or two minutes, each\n"+
		"further one 30 s (default: never)", number(&g.retryMax))
	fs.BoolVar(&g.replay, "replay", false, "run handlers for the remembered events of before its time, too")
	fs.StringVar(&g.cluster, "cluster", "", "nodes with another cluster `NAME` are not let in")
	fs.Func("encrypt", "a `KEY` from '{} keygen': only nodes with the key can read or join;\n"+
		"repeatable, or separated by commas: the first seals, all can open.\n"+
		"Others can see arguments: better set HAMLET_ENCRYPT", func(s string) error {
		a.keys = append(a.keys, strings.Split(s, ",")...)
		return nil
	})
	fs.Func("reap-after", "forget failed and left members after `DURATION` (default 24h)", duration(&g.reapAfter))
	fs.BoolVar(&a.leaveOnTerminate, "leave-on-terminate", false, "leave gracefully at SIGTERM, too")
	fs.Func("event-handler", "a script to run on events; repeatable. `SPEC` is SCRIPT or\n"+
		"EVENT[,EVENT...]=SCRIPT; an EVENT is member-join, member-leave,\n"+
		"member-failed, member-update, member-reap, user, user:NAME, query,\n"+
		"query:NAME or * (all of them)", func(s string) error { h.specs = append(h.specs, s); return nil })
	fs.Func("handler-timeout", "stop a script after `DURATION` (default 10m)", duration(&h.timeout))
	fs.StringVar(&a.logLevel, "log-level", "info", "`LEVEL` is trace, debug, info, warn or err")
}

func (a *agent) seed(s string) error {
	seeds := strings.Split(s, ",")
	a.gossip.seeds = append(a.gossip.seeds, seeds...)
	return checkAddrs(seeds)
}

// setFromEnvironment sets the options that were not given from their variables, and names the variables of none.
func setFromEnvironment(fs *flag.FlagSet) (unknown []string, err error) {
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, kv := range os.Environ() {
		variable, text, _ := strings.Cut(kv, "=")
		name, ours := strings.CutPrefix(variable, "HAMLET_")
		name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
		switch f := fs.Lookup(name); {
		case !ours:
		case f == nil:
			unknown = append(unknown, variable)
		case text != "" && !given[name] && err == nil:
			err = setFromVariable(variable, text, f)
		}
	}
	return unknown, err
}

// setFromVariable sets an option to the text of a variable, or to each item of it where the option is repeatable.
func setFromVariable(variable, text string, f *flag.Flag) error {
	items, note := []string{text}, ""
	if slices.Contains([]string{"encrypt", "event-handler", "join", "retry-join", "tag"}, f.Name) {
		items = splitList(text)
	}
	if len(items) > 1 && f.Name != "encrypt" && !strings.Contains(text, "\n") { // no error may show a key
		note = "; it is split at its commas: end it with a newline to have it split at newlines only"
	}
	for _, item := range items {
		err := f.Value.Set(item)
		if note != "" && (strings.Count(item, `"`)%2 > 0 || strings.Count(item, "'")%2 > 0) {
			err = errors.New("it breaks off inside quotes")
		}
		if err != nil {
			return fmt.Errorf("invalid value %q for %s: %w%s", item, variable, err, note)
		}
	}
	return nil
}

// splitList takes a list apart at its commas, or at its newlines if there are any. The events in
// member-join,user:x=script stay with their script.
func splitList(text string) (items []string) {
	sep := ","
	if strings.Contains(text, "\n") {
		sep = "\n"
	}
	for item := range strings.SplitSeq(text, sep) {
		last := len(items) - 1
		switch item = strings.TrimSpace(item); {
		case item == "":
		case last >= 0 && !strings.Contains(items[last], "=") && checkEvents(strings.Split(items[last], ",")) == nil:
			items[last] += "," + item
		default:
			items = append(items, item)
		}
	}
	return items
}

// check completes the configuration and returns the reason for the advertised address.
func (a *agent) check() (why string, err error) {
	cfg := &a.gossip
	if cfg.member.Name == "" {
		cfg.member.Name, _ = os.Hostname()
	}
	if err := validName(cfg.member.Name); err != nil {
		return "", usagef("choose a name with -node", "%v", err)
	}
	if cfg.member.Tags, err = makeTags(a.tags); err != nil {
		return "", usagef("", "-tag: %v", err)
	}
	host, port, _ := hostPort(a.bind, defaultPort)
	bind, err := netip.ParseAddrPort(net.JoinHostPort(cmp.Or(host, "0.0.0.0"), port)) // which takes no empty port
	if err != nil || bind.Addr().IsMulticast() {
		return "", usagef("-bind takes IP:PORT, such as 0.0.0.0:7946 or [::1]:7946",
			"-bind: %q is not an IP address and a port", a.bind)
	}
	cfg.bind = netip.AddrPortFrom(bind.Addr().Unmap(), bind.Port())
	if cfg.keys, err = parseKeys(a.keys); err != nil {
		return "", usagef(fmt.Sprintf("'%s keygen' makes a key", prog), "-encrypt: %v", err)
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

func (a *agent) run(fs *flag.FlagSet) error {
	if os.Getpid() == 1 {
		os.Exit(runAsInit())
	}
	unknown, err := setFromEnvironment(fs)
	if err != nil {
		return wrongUsage("agent", err)
	}
	level := slices.Index(logLevels, strings.ToLower(a.logLevel))
	if level < 0 {
		return usagef("", "-log-level: %q is none of %s", a.logLevel, strings.Join(logLevels, ", "))
	}
	logs := &logWriter{level: level, lines: make(chan string, 1024)}
	log.SetOutput(logs)
	a.handlers.log, a.gossip.log = log.Default(), log.Default()
	signals := prepareProcess()
	why, err := a.check()
	if err != nil {
		return err
	}
	addr, err := rpcAddr(a.rpcAddr)
	if err != nil {
		return err
	}
	ap, _ := netip.ParseAddrPort(addr) // zero where it is a host by name
	ln, err := net.Listen("tcp"+family(ap.Addr()), addr)
	if err != nil {
		return startFailure("the RPC", "-rpc-addr", addr, err)
	}
	a.gossip.otherPort = uint16(ln.Addr().(*net.TCPAddr).Port)
	handlers, err := newHandlers(a.handlers)
	if err != nil {
		return usagef(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.events = handlers.deliver
	g, err := newGossip(a.gossip)
	if err != nil {
		return startFailure("gossip", "-bind", a.gossip.bind.String(), err)
	}
	handlers.env = func() []string {
		self, alone := g.self()
		return handlerEnv(self, alone, ln.Addr().String(), a.rpcAuth)
	}
	go g.loop()
	a.banner(g, why, ln.Addr())
	for _, variable := range unknown {
		log.Printf("[WARN] there is no option %s: it is not looked at", variable)
	}
	logs.pumping.Go(logs.pump)
	defer logs.flush()
	rpc := serveRPC(ln, g, a.rpcAuth, func(json bool) string { return a.info(g, handlers, json) })
	ended := make(chan struct{})
	go func() { <-g.done; rpc.close(); handlers.close(g.last...); close(ended) }()
	return a.wait(g, ended, signals)
}

// prepareProcess fits the process to an agent, and returns the signals that it gets.
func prepareProcess() <-chan os.Signal {
	os.Unsetenv("HAMLET_ENCRYPT") // handlers have no use for it
	runtime.GOMAXPROCS(1)         // an agent mostly sleeps: a second processor costs a third more to wake up
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(48 << 20) // soft: the garbage of a flood is collected earlier
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // signal.Ignore would be inherited by handlers
	return signals
}

// startFailure explains why a port could not be opened.
func startFailure(what, option, addr string, err error) error {
	no, _ := errors.AsType[syscall.Errno](err)
	hint := map[syscall.Errno]string{
		syscall.EADDRINUSE:    "is an agent running there already? choose another address with " + option,
		syscall.EADDRNOTAVAIL: "this machine has no such address; choose another with " + option,
		syscall.EACCES:        "ports below 1024 need root; choose another with " + option,
	}[no]
	return failf(hint, "cannot listen on %s for %s: %v", addr, what, reason(err))
}

// banner tells how the agent can be reached, and warns of what is hardly meant.
func (a *agent) banner(g *gossip, why string, rpc net.Addr) {
	self, _ := g.self()
	fmt.Printf(`==> Starting hamlet agent...
==> Starting hamlet agent RPC...
==> hamlet agent running!
    Node name: '%s'
    Bind addr: '%s'
    Advertise: '%s' (%s)
     RPC addr: '%s'
    Encrypted: %v
`, self.Name, g.udp.LocalAddr(), self.Addr, why, rpc, len(a.gossip.keys) > 0)
	switch ip := self.Addr.Addr(); {
	case ip.IsLoopback() && a.gossip.moves: // the user did not choose it
		log.Printf("[WARN] advertising %s, which other machines cannot reach: %s (-advertise sets one)", self.Addr, why)
	case len(a.gossip.keys) == 0 && !ip.IsPrivate() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast():
		log.Printf("[WARN] %s is a public address, and there is no key: "+
			"whoever reaches it can join and lie (-encrypt sets one)", self.Addr)
	}
	if ip := rpc.(*net.TCPAddr).IP; !ip.IsLoopback() && a.rpcAuth == "" {
		log.Printf("[WARN] the RPC listens on %s without a token: whoever reaches it controls this agent "+
			"(-rpc-auth sets one)", rpc)
	}
}

// info is what the agent knows of itself.
func (a *agent) info(g *gossip, handlers *handlers, json bool) string {
	self, _ := g.self()
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
	g.run(func(n *node) error { about = n.info(); return nil })
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
	if json {
		return toJSON(all, "\n") + "\n"
	}
	return text
}

// wait returns when the agent has ended: told by a signal, by the leave command, or by itself.
func (a *agent) wait(g *gossip, ended <-chan struct{}, signals <-chan os.Signal) error {
	var told time.Time // to stop
	for {
		select {
		case <-ended:
			if errors.Is(g.err, errNameTaken) {
				return failf("choose another name with -node", "%v", g.err)
			}
			return g.err
		case s := <-signals:
			switch {
			case s == syscall.SIGHUP: // Serf would read its configuration again
				log.Print("[INFO] hangup: there is no configuration to reload, carrying on")
			case !told.IsZero() && time.Since(told) > sameSignal:
				return failf("", "%v while stopping: ended at once", s)
			case !told.IsZero():
			case s == os.Interrupt || s == syscall.SIGTERM && a.leaveOnTerminate:
				log.Printf("[INFO] %v: leaving the cluster, a second signal ends at once", s)
				told = time.Now()
				go g.leave()
			default:
				log.Printf("[INFO] %v: ending without leaving", s)
				told = time.Now()
				go g.close() // peers notice at once; handlers get their grace
			}
		}
	}
}

// runAsInit is the first process of a container: it runs this same program as its child and returns that child's
// exit status. It forwards the signals that stop an agent and waits for every process that lost its parent. It
// starts nothing else, because wait4(-1) would take os/exec's children away from it.
func runAsInit() (exit int) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	exe, _ := os.Executable()
	exe = cmp.Or(exe, os.Args[0])
	// In a group of its own, so that ^C at a terminal arrives once: from here.
	child, err := syscall.ForkExec(exe, os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "hamlet: error: cannot start %s: %v\n", exe, err)
		return 1
	}
	go func() {
		for s := range signals {
			syscall.Kill(child, s.(syscall.Signal))
		}
	}()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err != nil && err != syscall.EINTR:
			return 1
		case pid == child && ws.Exited():
			return ws.ExitStatus()
		case pid == child && ws.Signaled():
			return 128 + int(ws.Signal())
		}
	}
}

// waitAtMost reports whether wait returned within d.
func waitAtMost(d time.Duration, wait func()) bool {
	ctx, done := context.WithTimeout(context.Background(), d)
	go func() { wait(); done() }()
	<-ctx.Done()
	return errors.Is(ctx.Err(), context.Canceled)
}

// ---- addresses ----

// hostPort splits HOST, HOST:PORT, IP, [IPv6] or [IPv6]:PORT; port stands in for a missing one.
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

func checkAddrs(addrs []string) error {
	for _, s := range addrs {
		if host, port, err := hostPort(s, defaultPort); err != nil || host == "" || port == "0" {
			return fmt.Errorf("%q is not HOST or HOST:PORT, such as 10.0.2.15:7946 or [2001:db8::7]:7946", s)
		}
	}
	return nil
}

// rpcAddr completes the address of an RPC.
func rpcAddr(s string) (string, error) {
	host, port, err := hostPort(s, defaultRPCPort)
	if err != nil {
		err = usagef("-rpc-addr takes HOST:PORT, such as "+defaultRPC, "-rpc-addr: %v", err)
	}
	return net.JoinHostPort(host, port), err
}

// resolve looks up all addresses of all hosts at the same time; port stands in for a missing one. What takes
// longer than 1.5 s counts as failed.
func resolve(ctx context.Context, hosts []string, port string) (addrs []netip.AddrPort, errs []string) {
	ctx, cancel := context.WithTimeout(ctx, 1500*ms)
	defer cancel()
	found, failed := make([][]net.IPAddr, len(hosts)), make([]error, len(hosts))
	var all sync.WaitGroup
	for i, s := range hosts {
		all.Go(func() {
			host, _, err := hostPort(s, port)
			if failed[i] = err; err == nil {
				found[i], failed[i] = net.DefaultResolver.LookupIPAddr(ctx, host) // LookupNetIP would lose a zone
			}
		})
	}
	all.Wait()
	for i, s := range hosts {
		if failed[i] != nil {
			errs = append(errs, fmt.Sprintf("%s: %v", s, failed[i]))
		}
		_, port, _ := hostPort(s, port)
		for _, ip := range found[i] {
			addr, _ := netip.AddrFromSlice(ip.IP) // only IPv6 has zones
			a := netip.MustParseAddrPort(net.JoinHostPort(addr.Unmap().WithZone(ip.Zone).String(), port))
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs, errs
}

// advertised returns the address that others are told, and the reason. It is never a wildcard, and
// loopback only if that is asked for or if there is nothing else.
func (a *agent) advertised() (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	try := func(ip netip.Addr, reason string) {
		if !addr.IsValid() && usable(ip, bind.Addr()) {
			addr, why = netip.AddrPortFrom(ip, bind.Port()), reason
		}
	}
	switch {
	case a.advertise != "" && a.iface != "":
		return addr, "", usagef("give one of them", "-advertise %s and -iface %s", a.advertise, a.iface)
	case a.advertise != "":
		found, errs := resolve(context.Background(), []string{a.advertise}, fmt.Sprint(bind.Port()))
		for _, ap := range found {
			if ip := ap.Addr(); !ip.IsUnspecified() && !ip.IsMulticast() && sameFamily(ip, bind.Addr()) {
				return ap, "set with -advertise", nil
			}
		}
		errs = append(errs, fmt.Sprintf("no address at which others could reach %s", bind))
		return addr, "", usagef("-advertise takes HOST or HOST:PORT", "-advertise %q: %s", a.advertise, errs[0])
	case a.iface == "" && !bind.Addr().IsUnspecified():
		return bind, "the bound address", nil
	case a.iface == "":
		seeds, _ := resolve(context.Background(), a.gossip.seeds, defaultPort)
		for _, seed := range seeds {
			try(sourceTo(seed.Addr()), fmt.Sprintf("source address of the route to %s", seed.Addr()))
		}
		for _, far := range []string{"198.51.100.1", "2001:db8::1"} { // reserved for documentation, so never near
			try(sourceTo(netip.MustParseAddr(far)), "source address of the default route")
		}
	}
	ifcs, _ := net.Interfaces()
	for _, ifc := range ifcs {
		if ifc.Name == a.iface || a.iface == "" && ifc.Flags&net.FlagUp != 0 {
			addrs, _ := ifc.Addrs()
			for _, ip := range addrs {
				try(ipOf(ip), "address of "+ifc.Name)
			}
		}
	}
	switch {
	case addr.IsValid():
		return addr, why, nil
	case a.iface != "":
		return addr, "", usagef("-iface takes the name of an interface",
			"-iface: there is no interface %q with an address at which others could reach %s", a.iface, bind)
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1}) // which [::] takes as well
	return netip.AddrPortFrom(loopback, bind.Port()), "no other address was found", nil
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

// ipOf is the address of an interface, without the length of its network.
func ipOf(a net.Addr) netip.Addr {
	p, _ := netip.ParsePrefix(a.String())
	return p.Addr().Unmap()
}

// usable reports whether other machines may reach ip at a socket bound to bind.
func usable(ip, bind netip.Addr) bool {
	return ip.IsGlobalUnicast() && ip.Zone() == "" && sameFamily(ip, bind)
}

// family ends the name of the network for a socket bound to ip: as "4", or 0.0.0.0 would take IPv6 as well.
func family(ip netip.Addr) string {
	if ip.Is4() {
		return "4"
	}
	return ""
}

// sameFamily reports whether a socket bound to bind takes packets of ip's family.
func sameFamily(ip, bind netip.Addr) bool {
	return ip.Is4() == bind.Is4() || bind == netip.IPv6Unspecified()
}

// isOwnAddress reports whether others can reach this machine at ip, as far as it knows.
func isOwnAddress(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err != nil || !ip.IsLoopback() && slices.ContainsFunc(addrs, func(a net.Addr) bool { return ipOf(a) == ip })
}

// ---- the log ----

var logLevels = []string{"trace", "debug", "info", "warn", "err"}

// logWriter writes log lines of a level and above. It never blocks: a terminal that was halted must not halt the
// agent. Until pump runs, lines wait.
type logWriter struct {
	level   int
	lines   chan string // "" is the end
	dropped atomic.Int64
	pumping sync.WaitGroup
}

// Write takes one line as log.Logger writes it, "2013/12/08 07:56:48 [INFO] ...".
func (w *logWriter) Write(p []byte) (int, error) {
	line := string(p)
	word, _, _ := strings.Cut(line[min(len(line), len("2013/12/08 07:56:48 ")):], " ")
	if level := slices.Index(logLevels, strings.ToLower(strings.Trim(word, "[]"))); level >= 0 && level < w.level {
		return len(p), nil
	}
	select {
	case w.lines <- printable(line, "\n\t"):
	default:
		w.dropped.Add(1)
	}
	return len(p), nil
}

func (w *logWriter) pump() {
	for line := <-w.lines; line != ""; line = <-w.lines {
		os.Stderr.WriteString(line)
		if n := w.dropped.Swap(0); n > 0 {
			log.New(os.Stderr, "", log.LstdFlags).Printf("[WARN] %d log lines were lost here: nobody took them in time", n)
		}
	}
}

// flush writes what is left, for two seconds at most.
func (w *logWriter) flush() {
	waitAtMost(2*time.Second, func() { w.lines <- ""; w.pumping.Wait() })
}
