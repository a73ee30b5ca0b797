// main.go: what a user types and sees: the commands with their options, help, output and errors, addresses, the
// log, and the wiring of an agent.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
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
	"time"
	"unicode"
	"unicode/utf16"
)

const version = "0.2.0"

// handlersPage is the contract between agent and handlers, as 'help handlers' shows it.
//
//go:embed docs/handlers.md
var handlersPage string

var prog = filepath.Base(os.Args[0]) // the name that the program was called by

const (
	defaultPort    = "7946"
	defaultRPCPort = "7373"
	defaultRPC     = "127.0.0.1:" + defaultRPCPort
	keySize        = 32 // of a new key
	rpcTimeout     = 5 * time.Second
	slowTimeout    = 20 * time.Second // a join or a leave takes the agent itself up to fifteen
	startPatience  = time.Second      // how long the banner waits for the name of -advertise
	addressPoll    = 500 * ms         // between looks whether there is an address to advertise now
	// One Ctrl-C arrives twice when a wrapper such as timeout or sudo passes it on.
	sameSignal = 200 * ms
)

// failure is an error as a user reads it.
type failure struct {
	msg       string
	hint      string
	code      int  // exit status: 1, or 2 for wrong usage
	retriable bool // the same may work a little later
}

func (f *failure) Error() string { return f.msg }

// failf makes a failure of what was asked for, usagef one of how it was asked.
func failf(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 1}
}

func usagef(hint, format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), hint: hint, code: 2}
}

func main() {
	args := os.Args[1:]
	if len(args) == 0 {
		args = []string{""}
	}
	if err := execute(args[0], args[1:]); err != nil {
		exit(err)
	}
}

// exit reports err, and ends the program.
func exit(err error) {
	f, ok := errors.AsType[*failure](err)
	if !ok {
		f = &failure{code: 1}
	}
	fmt.Fprintf(os.Stderr, "%s: error: %s\n", prog, printable(err.Error(), "\n\t"))
	if f.hint != "" {
		fmt.Fprintf(os.Stderr, "hint: %s\n", printable(f.hint, "\n\t"))
	}
	os.Exit(f.code)
}

// execute runs the command of that name.
func execute(name string, args []string) error {
	switch name {
	case "":
		if err := output(help()); err != nil {
			return err
		}
		return usagef("", "no command given")
	case "help", "-h", "-help", "--help":
		if len(args) == 0 || args[0] == "help" {
			return output(help())
		}
		if args[0] == "handlers" {
			return output(plainText(handlersPage))
		}
		name = args[0]
		args = []string{"-h"}
	case "-v", "-version", "--version":
		name = "version"
	}

	var names []string
	for _, c := range commands() {
		if c.name == name {
			return c.execute(args)
		}
		names = append(names, c.name)
	}
	if advice := serfAdvice(name); advice != "" {
		return usagef("", "hamlet has no %s: %s", name, advice)
	}
	hint := fmt.Sprintf("'%s help' lists the commands; '%s agent' starts a node", prog, prog)
	if near := nearest(name, names); near != "" {
		hint = fmt.Sprintf("did you mean '%s %s'? %s", prog, near, hint)
	}
	return usagef(hint, "there is no command %q", name)
}

// ---- commands and options ----

// command is one command. Its define declares the options on fs, and returns what runs the command once they are set,
// with its arguments.
type command struct {
	name     string
	args     string // what follows the options: WORD, [WORD] or WORD...
	short    string
	examples string // {} stands for the program's name
	define   func(fs *flag.FlagSet) (run func(args []string) error)
}

// commands are all commands, in the order in which help lists them.
func commands() []command {
	return []command{
		{"agent", "", "runs a node until it is told to stop", agentExamples, agentCommand},
		{"members", "", "lists the members of the cluster", membersExamples, membersCommand},
		{"watch", "", "shows who is there, and then what happens, as it happens", watchExamples, watchCommand},
		{"query", "NAME [PAYLOAD]", "asks members; their handlers' output is the answer", queryExamples, queryCommand},
		{"info", "", "shows what the agent knows of itself", infoExamples, infoCommand},
		{"tags", "", "changes the tags of the running agent", tagsExamples, tagsCommand},
		{"event", "NAME [PAYLOAD]", "sends a user event to the handlers of every member", eventExamples, eventCommand},
		{"join", "ADDR...", "makes the agent join the cluster of another node", joinExamples, joinCommand},
		{"leave", "", "makes the agent leave the cluster and stop", leaveExamples, leaveCommand},
		{"force-leave", "NAME", "turns a failed member into one that left", forceLeaveExamples, forceLeaveCommand},
		{"keygen", "", "prints a new key for -encrypt", keygenExamples, keygenCommand},
		{"version", "", "prints the version", versionExamples, versionCommand},
	}
}

// execute sets the options from args, and runs the command.
func (c command) execute(args []string) error {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	run := c.define(fs)
	operands, ignored, err := parseArgs(fs, args)
	if errors.Is(err, flag.ErrHelp) {
		return output(c.help(fs))
	}
	if err == nil {
		err = c.checkOperands(operands)
	}
	if err != nil {
		return wrongUsage(c.name, err)
	}

	for _, name := range ignored {
		fmt.Fprint(os.Stderr, formatLine(logLine{levelWarn, fmt.Sprintf("-%s has no effect: %s", name, serfIgnored[name])}, underJournal()))
	}
	if c.name != "agent" { // which has its own way with signals
		quit := make(chan os.Signal, 1)
		signal.Notify(quit, syscall.SIGQUIT) // Go would print stacks
		go func() {
			<-quit
			os.Exit(128 + int(syscall.SIGQUIT))
		}()
	}
	return run(operands)
}

// parseArgs sets options wherever they stand, and returns all other arguments. Behind an argument, what looks like an
// option and is none is an argument, too: a payload may be "-5". After "--" nothing is an option. It names the options of
// Serf that have no effect here.
func parseArgs(fs *flag.FlagSet, args []string) (operands, ignored []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if arg == "--" {
			return append(operands, args...), ignored, nil
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		option := fs.Lookup(name)
		_, serfs := serfIgnored[name]
		looksLikeOption := len(arg) > 1 && arg[0] == '-'
		isPayload := option == nil && !serfs && len(operands) > 0
		if !looksLikeOption || isPayload {
			operands = append(operands, arg)
			continue
		}
		if option == nil && !serfs {
			return nil, nil, unknownOption(fs, name)
		}

		if !hasValue && isSwitch(name, option) {
			value = "true"
		} else if !hasValue {
			if len(args) == 0 {
				return nil, nil, fmt.Errorf("-%s needs a value", name)
			}
			value = args[0]
			args = args[1:]
		}
		if option == nil {
			ignored = append(ignored, name)
			continue
		}
		if err := setOption(fs, name, value); err != nil {
			return nil, nil, err
		}
	}
	return operands, ignored, nil
}

// isSwitch reports whether an option, or (nil) one of Serf's, stands without a value.
func isSwitch(name string, option *flag.Flag) bool {
	if option == nil {
		return slices.Contains([]string{"disable-compression", "rejoin", "syslog"}, name)
	}
	b, ok := option.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// setOption sets an option of fs, and says what is wrong with its value.
func setOption(fs *flag.FlagSet, name, value string) error {
	err := fs.Set(name, value)
	if err != nil && isSwitch(name, fs.Lookup(name)) {
		err = errors.New("want true or false")
	}
	if err != nil {
		return fmt.Errorf("invalid value %q for -%s: %w", value, name, err)
	}
	return nil
}

func unknownOption(fs *flag.FlagSet, name string) error {
	if name == "h" || name == "help" {
		return flag.ErrHelp
	}
	if advice := serfAdvice("-" + name); advice != "" {
		return usagef("", "hamlet has no -%s: %s", name, advice)
	}
	var names []string
	fs.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	if near := nearest(name, names); near != "" {
		return fmt.Errorf("there is no option -%s; did you mean -%s?", name, near)
	}
	return fmt.Errorf("there is no option -%s", name)
}

// checkOperands compares the arguments with what the command takes.
func (c command) checkOperands(operands []string) error {
	takes := strings.Fields(c.args)
	if len(operands) == 0 && len(takes) > 0 {
		return fmt.Errorf("%s is missing", c.args)
	}
	if len(operands) <= len(takes) || strings.HasSuffix(c.args, "...") {
		return nil
	}
	extra := operands[len(takes)]
	if _, err := parseKeys(strings.Split(extra, ",")); err == nil {
		extra = "(a key)" // which is never shown
	}
	return fmt.Errorf("unexpected argument %q", extra)
}

func wrongUsage(command string, err error) error {
	if _, ok := errors.AsType[*failure](err); ok {
		return err
	}
	return usagef(fmt.Sprintf("'%s help %s' shows how to use it", prog, command), "%s: %v", command, err)
}

// nearest is the word of a list that was probably meant by word, which is not in it: at most two letters differ, and
// fewer than half. It is "" where none is near.
func nearest(word string, list []string) string {
	best := ""
	least := min(2, (len(word)-1)/2)
	for _, candidate := range list {
		if d := editDistance(word, candidate); d <= least && (best == "" || d < editDistance(word, best)) {
			best = candidate
		}
	}
	return best
}

// editDistance counts the letters to insert, delete, change or swap with the next one that lead from a to b (Damerau and
// Levenshtein, the restricted form).
func editDistance(a, b string) int {
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range b {
		d[0][j+1] = j + 1
	}
	for i := range a {
		for j := range b {
			change := 1
			if a[i] == b[j] {
				change = 0
			}
			d[i+1][j+1] = min(d[i][j+1]+1, d[i+1][j]+1, d[i][j]+change)
			swapped := i > 0 && j > 0 && a[i] == b[j-1]
			if swapped && a[i-1] == b[j] {
				d[i+1][j+1] = min(d[i+1][j+1], d[i-1][j-1]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}

// serfIgnored are the options of Serf that could only tune what needs no tuning here, with what happens instead. They are
// taken, so that no start command has to change for them.
var serfIgnored = map[string]string{
	"broadcast-timeout":   "news goes out at once",
	"disable-compression": "nothing is compressed",
	"profile":             "there is one timing, for LAN and WAN alike",
	"protocol":            "agents agree on a protocol by themselves",
	"rejoin":              "an agent that left joins again by -join",
	"relay-factor":        "an answer is sent again until it has arrived",
	"retry-interval":      "seeds are tried once a second at first, then ever more rarely",
	"snapshot":            "nothing is kept on disk: a restarted agent finds its cluster by -join, or is found",
	"syslog":              "the log goes to stderr: let systemd or 'logger' take it",
}

// serfAdvice is what to do instead of what Serf has and hamlet has not; "": it is no such word.
func serfAdvice(word string) string {
	switch word {
	case "-discover", "-mdns-iface", "-mdns-disable-ipv4", "-mdns-disable-ipv6":
		return "name the seeds with -join: one DNS name will do"
	case "-keyring-file":
		return "give each key with -encrypt or HAMLET_ENCRYPT: the first seals, any opens"
	case "-tags-file":
		return "give tags with -tag or HAMLET_TAG, and change them with the tags command"
	case "keys":
		return "change -encrypt to OLD,NEW, then NEW,OLD, then NEW, with a SIGHUP to every agent each time"
	case "reachability":
		return "every member is looked at all the time: see 'members' and 'info'"
	case "rtt":
		return "there are no network coordinates: use ping"
	case "monitor":
		return "'watch' streams events, and the log is the agent's stderr"
	}
	return ""
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
	for _, c := range commands() {
		text += fmt.Sprintf("  %-12s %s\n", c.name, c.short)
	}
	text += "\n'{} help COMMAND' shows how to use a command, and its options,\n" +
		"'{} help handlers' what scripts are told.\n"
	return strings.ReplaceAll(text, "{}", prog)
}

func (c command) help(fs *flag.FlagSet) string {
	var list strings.Builder
	fs.SetOutput(&list)
	fs.PrintDefaults()

	usage := c.name
	if list.Len() > 0 {
		usage += " [OPTION...]"
	}
	if c.args != "" {
		usage += " " + c.args
	}
	text := "Usage: {} " + usage + "\n\n" + c.examples
	if list.Len() > 0 {
		text += "\n" + list.String()
	}
	return strings.ReplaceAll(text, "{}", prog)
}

// plainText is a page of Markdown as a terminal shows it: headings in capitals, code indented.
func plainText(markdown string) string {
	var b strings.Builder
	inCode := false
	for line := range strings.Lines(markdown) {
		if strings.HasPrefix(line, "```") {
			inCode = !inCode
			continue
		}
		heading := strings.TrimLeft(line, "#")
		switch {
		case inCode && line != "\n":
			b.WriteString("    " + line)
		case !inCode && heading != line:
			b.WriteString(strings.ToUpper(strings.TrimLeft(heading, " ")))
		default:
			b.WriteString(strings.ReplaceAll(line, "`", ""))
		}
	}
	return b.String()
}

// numberOption defines an option that takes a number of 0 or more.
func numberOption(fs *flag.FlagSet, n *int, name, usage string) {
	fs.Func(name, usage, func(s string) error {
		u, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			return errors.New("want a number, 0 or more")
		}
		*n = int(u)
		return nil
	})
}

// durationOption defines an option that takes a duration above 0.
func durationOption(fs *flag.FlagSet, d *time.Duration, name, usage string) {
	fs.Func(name, usage, func(s string) error {
		parsed, err := time.ParseDuration(s)
		if err != nil || parsed <= 0 {
			return errors.New("want a duration, such as 500ms, 20s or 10m")
		}
		*d = parsed
		return nil
	})
}

// formatOption defines -format, and returns whether JSON is wanted.
func formatOption(fs *flag.FlagSet) (asJSON *bool) {
	asJSON = new(bool)
	fs.Func("format", "`FORMAT` of the output: text or json (default text)", func(s string) error {
		if s != "json" && s != "text" {
			return errors.New("want text or json")
		}
		*asJSON = s == "json"
		return nil
	})
	return asJSON
}

// setTag returns the way to take KEY=VALUE, or what is missing of it after a prefix.
func setTag(tags map[string]string, prefix string) func(string) error {
	return func(s string) error {
		k, v, ok := strings.Cut(prefix+s, "=")
		if !ok {
			return errors.New("want KEY=VALUE, such as role=web")
		}
		if old := tags[k]; k == "role" && old != "" && old != v {
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

// toJSON lays v out as Serf does, indented by two blanks.
func toJSON(v any) string { return marshal(v, "  ") }

// toJSONLine lays v out on one line.
func toJSONLine(v any) string {
	// Newlines and tabs inside strings are escaped, so these stand between values.
	lines := strings.ReplaceAll(marshal(v, "\t"), "\t", "")
	return strings.NewReplacer(",\n", ", ", "\n", "").Replace(lines) + "\n"
}

func marshal(v any, indent string) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	if err := enc.Encode(v); err != nil {
		panic(err) // strings, numbers and maps of them always encode
	}

	// A terminal obeys DEL and the C1 controls, and bidi marks hide things. They stand inside strings only.
	var safe strings.Builder
	for _, r := range b.String() {
		if unicode.IsGraphic(r) || r == '\n' || r == '\t' {
			safe.WriteRune(r)
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&safe, `\u%04x`, u)
		}
	}
	return safe.String()
}

// ---- the commands that ask a running agent ----

// client is how a command reaches its agent.
type client struct {
	addr  string // of the agent's RPC
	token string
}

// rpcOptions defines the options that say where the agent is.
func rpcOptions(fs *flag.FlagSet) *client {
	addr := rpcVariable("ADDR")
	if addr == "" {
		addr = defaultRPC
	}
	c := &client{}
	fs.StringVar(&c.addr, "rpc-addr", addr, "`HOST:PORT` of its RPC, or SERF_RPC_ADDR")
	fs.StringVar(&c.token, "rpc-auth", "", "the `TOKEN` that it asks for, or SERF_RPC_AUTH")
	c.token = rpcVariable("AUTH") // not as a default, which help would show
	return c
}

// rpcVariable is SERF_RPC_name, which handlers have, or what the agent of the same container was configured with.
func rpcVariable(name string) string {
	if value := os.Getenv("SERF_RPC_" + name); value != "" {
		return value
	}
	return os.Getenv("HAMLET_RPC_" + name)
}

// call asks the agent and calls each with each response; see callRPC.
func (c *client) call(req rpcRequest, timeout time.Duration, each func(rpcResponse, []update) error) error {
	addr, err := rpcAddr(c.addr)
	if err != nil {
		return err
	}
	return callRPC(addr, c.token, req, timeout, each)
}

// tell has the agent do something, and then prints that it is done.
func (c *client) tell(req rpcRequest, timeout time.Duration, done string) error {
	return c.call(req, timeout, func(rpcResponse, []update) error { return output(done) })
}

// argument is the i-th of the arguments, or "".
func argument(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

const infoExamples = `  {} info
  {} info -format json
`

func infoCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	asJSON := formatOption(fs)

	return func([]string) error {
		var facts []string
		err := agent.call(rpcRequest{Op: "info"}, rpcTimeout, func(a rpcResponse, _ []update) error {
			facts = append(facts, splitNUL(a.Text)...)
			return nil
		})
		if err != nil {
			return err
		}
		facts = joinFacts(facts)
		if *asJSON {
			return output(infoJSON(facts))
		}
		return output(infoText(facts))
	}
}

// joinFacts joins the values of equal keys, as those of handlers of one event.
func joinFacts(facts []string) (joined []string) {
	place := make(map[[2]string]int) // of each key's value
	for fact := range slices.Chunk(facts[:len(facts)/3*3], 3) {
		key := [2]string{fact[0], fact[1]}
		if i, ok := place[key]; ok {
			joined[i] += ", " + fact[2]
			continue
		}
		place[key] = len(joined) + 2
		joined = append(joined, fact...)
	}
	return joined
}

// infoText shows facts: group, key, value; and so on.
func infoText(facts []string) string {
	var b strings.Builder
	group := ""
	for fact := range slices.Chunk(facts, 3) {
		if fact[0] != group {
			group = fact[0]
			fmt.Fprintf(&b, "%s:\n", printable(group, ""))
		}
		if fact[1] != "" {
			fmt.Fprintf(&b, "\t%s = %s\n", printable(fact[1], ""), printable(fact[2], ""))
		}
	}
	return b.String()
}

func infoJSON(facts []string) string {
	groups := make(map[string]map[string]string)
	for fact := range slices.Chunk(facts, 3) {
		group := groups[fact[0]]
		if group == nil {
			group = make(map[string]string)
			groups[fact[0]] = group
		}
		if fact[1] != "" {
			group[fact[1]] = fact[2]
		}
	}
	return toJSON(groups)
}

const tagsExamples = `  {} tags -set state=drain
  {} tags -set health=ok -set zone=b -delete state
`

func tagsCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	set := make(map[string]string)
	var remove []string
	fs.Func("set", "set the tag `KEY=VALUE`; repeatable", setTag(set, ""))
	fs.Func("delete", "remove the tag `KEY`; repeatable", func(key string) error {
		if key == "" || strings.Contains(key, "=") {
			return errors.New("want KEY, such as state")
		}
		remove = append(remove, key)
		return nil
	})

	return func([]string) error {
		tags, err := makeTags(set)
		if err != nil {
			return usagef("", "-set: %v", err)
		}
		if len(set)+len(remove) == 0 {
			return usagef("for example: -set state=drain", "nothing to change: give -set or -delete")
		}
		req := rpcRequest{Op: "tags", Args: string(tags), DeleteTags: strings.Join(remove, "\x00")}
		return agent.tell(req, rpcTimeout, "Successfully updated agent tags\n")
	}
}

const eventExamples = `  {} event deploy
  {} event deploy 3f2c1aa       with a payload, the handlers' input
  {} event -coalesce=false log "$(uptime)"
`

func eventCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	coalesce := fs.Bool("coalesce", true, "of events of one name that wait, run only the last")

	return func(args []string) error {
		req := rpcRequest{Op: "event", Name: args[0], Payload: []byte(argument(args, 1)), Coalesce: *coalesce}
		done := fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(args[0], ""), *coalesce)
		return agent.tell(req, rpcTimeout, done)
	}
}

const joinExamples = `  {} join 10.0.2.15
  {} join 10.0.2.15:7946 node2.example.com '[2001:db8::7]:7946'
`

func joinCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	replay := fs.Bool("replay", false, "run handlers for the remembered events of that cluster")

	return func(addrs []string) error {
		if err := checkAddrs(addrs); err != nil {
			return usagef("", "join: %v", err)
		}
		req := rpcRequest{Op: "join", Args: strings.Join(addrs, "\x00"), Replay: *replay}
		return agent.call(req, slowTimeout, func(a rpcResponse, _ []update) error {
			if a.More {
				return nil // the agent is at it
			}
			text := fmt.Sprintf("Successfully joined cluster by contacting %d nodes.\n", a.Count)
			if a.Text != "" { // one of them is the agent itself
				text += printable(a.Text, "") + "\n"
			}
			return output(text)
		})
	}
}

const leaveExamples = "  {} leave\n"

func leaveCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)

	return func([]string) error {
		return agent.tell(rpcRequest{Op: "leave"}, slowTimeout, "Graceful leave complete\n")
	}
}

const forceLeaveExamples = `  {} force-leave web3           a failed member counts as left, everywhere
  {} force-leave -prune web3    it vanishes from the list
`

func forceLeaveCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	prune := fs.Bool("prune", false, "forget the member altogether")

	return func(args []string) error {
		return agent.tell(rpcRequest{Op: "force-leave", Name: args[0], Prune: *prune}, rpcTimeout, "")
	}
}

const keygenExamples = `  {} keygen
  HAMLET_ENCRYPT=$({} keygen) {} agent
`

func keygenCommand(*flag.FlagSet) func([]string) error {
	return func([]string) error {
		key := make([]byte, keySize)
		rand.Read(key) // never fails
		return output(base64.StdEncoding.EncodeToString(key) + "\n")
	}
}

const versionExamples = "  {} version\n"

func versionCommand(*flag.FlagSet) func([]string) error {
	return func([]string) error {
		return output(fmt.Sprintf("hamlet %s (%sprotocol %d, %s, %s/%s)\n", version, commit(), protocolVersion,
			runtime.Version(), runtime.GOOS, runtime.GOARCH))
	}
}

// commit is what the program was built from, where the build knows it.
func commit() string {
	info, _ := debug.ReadBuildInfo()
	settings := make(map[string]string)
	if info != nil {
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
	}
	revision := settings["vcs.revision"]
	if revision == "" {
		return ""
	}
	if settings["vcs.modified"] == "true" {
		return fmt.Sprintf("commit %.10s with changes, ", revision)
	}
	return fmt.Sprintf("commit %.10s, ", revision)
}

// ---- members ----

const membersExamples = `  {} members                                list all members
  {} members -status alive -tag role=web    the living ones with a tag
  {} members -name 'db[0-9]+' -format json
  {} members -wait 3 -timeout 20s           wait until three are alive
`

func membersCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	asJSON := formatOption(fs)
	filter := make(memberFilter)
	var wait int
	var timeout time.Duration
	fs.Func("status", "only those of status `RE`: alive, leaving, left or failed", filter.set("status="))
	fs.Func("name", "only those whose name matches `RE`, a regular expression, as a whole", filter.set("name="))
	fs.Func("tag", "only those with such a tag, `KEY=RE`; repeatable", filter.set("tag "))
	fs.Func("role", "the same as -tag role=`RE`", filter.set("tag role="))
	detailed := fs.Bool("detailed", false, "show each one's version and protocol, and for how long it has had its\n"+
		"status")
	numberOption(fs, &wait, "wait", "wait until `N` of those listed are alive, even for the agent to start;\n"+
		"exit status 1 if it took too long")
	durationOption(fs, &timeout, "timeout", "the `DURATION` to wait (default: for ever)")

	return func([]string) error {
		if timeout > 0 && wait == 0 {
			return usagef("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
		}
		status := filter["status"]
		if wait > 0 && status != nil && !status.MatchString(statusAlive.String()) {
			return usagef("", "-wait counts the living, and -status leaves them out")
		}
		members, err := agent.waitForMembers(filter, wait, timeout)
		if err != nil {
			return err
		}
		if *asJSON {
			return output(membersJSON(members, *detailed))
		}
		return output(membersText(members, *detailed))
	}
}

// memberStatus is a member, and for how long it has had its status.
type memberStatus struct {
	Member
	since time.Duration
}

// members asks for the members that match filter.
func (c *client) members(filter memberFilter, timeout time.Duration) (members []memberStatus, err error) {
	err = c.call(rpcRequest{Op: "members"}, timeout, func(_ rpcResponse, us []update) error {
		for _, u := range us {
			if filter.matches(u.Member) {
				members = append(members, memberStatus{u.Member, time.Duration(min(u.Age, uint64(math.MaxInt64/ms))) * ms})
			}
		}
		return nil
	})
	slices.SortStableFunc(members, func(a, b memberStatus) int { return compareNames(a.Name, b.Name) })
	return members, err
}

// compareNames orders names as people count: host-8 before host-79. Of numbers alike, the one with fewer zeros is first.
func compareNames(a, b string) int {
	x, y := a, b
	for x != "" && y != "" {
		digitsX, digitsY := leadingDigits(x), leadingDigits(y)
		if digitsX == "" || digitsY == "" {
			if x[0] != y[0] {
				return strings.Compare(x, y)
			}
			x = x[1:]
			y = y[1:]
			continue
		}
		numberX, numberY := strings.TrimLeft(digitsX, "0"), strings.TrimLeft(digitsY, "0")
		if len(numberX) != len(numberY) {
			return len(numberX) - len(numberY)
		}
		if numberX != numberY {
			return strings.Compare(numberX, numberY)
		}
		x = x[len(digitsX):]
		y = y[len(digitsY):]
	}
	if x == y {
		return len(a) - len(b)
	}
	return len(x) - len(y)
}

func leadingDigits(s string) string {
	return s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
}

// waitForMembers asks for the members that match filter until wait of them are alive, or timeout (0: none) is over.
func (c *client) waitForMembers(filter memberFilter, wait int, timeout time.Duration) ([]memberStatus, error) {
	const pause = 100 * ms
	if timeout == 0 {
		timeout = math.MaxInt64
	}
	deadline := time.Now().Add(timeout)
	var tooFew error // what the last answer lacked
	for {
		members, err := c.members(filter, min(rpcTimeout, max(time.Until(deadline), pause)))
		living := aliveNames(members)
		if err == nil && len(living) >= wait {
			return members, nil
		}
		if wait == 0 {
			return nil, err
		}
		if f, ok := errors.AsType[*failure](err); err != nil && !(ok && f.retriable) {
			return nil, err
		}

		if err == nil {
			names := "none"
			if len(living) > 0 {
				names = strings.Join(living, ", ")
			}
			tooFew = failf("", "%d of %d members alive after %v: %s", len(living), wait, timeout, names)
		}
		if time.Until(deadline) <= pause && tooFew != nil {
			return nil, tooFew
		}
		if time.Until(deadline) <= pause {
			return nil, err
		}
		time.Sleep(pause)
	}
}

func aliveNames(members []memberStatus) (names []string) {
	for _, m := range members {
		if m.Status == statusAlive {
			names = append(names, m.Name)
		}
	}
	return names
}

// memberFilter is what members must match, by field: "name", "status", or a tag as "tag KEY".
type memberFilter map[string]*regexp.Regexp

// set returns the way to take FIELD=RE, or what is missing of it after a prefix.
func (f memberFilter) set(prefix string) func(string) error {
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

func (f memberFilter) matches(m Member) bool {
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

// membersText makes columns at least four blanks apart. The third is never narrower than "failed", so that tags
// stay in place when a member fails.
func membersText(members []memberStatus, detailed bool) string {
	var rows [][]string
	for _, m := range members {
		row := []string{printable(m.Name, ""), m.Addr.String(), fmt.Sprintf("%-6s", m.Status)}
		if detailed {
			row = append(row, "for "+m.since.Round(time.Second).String(), "version "+printable(m.Version, ""),
				fmt.Sprint("protocol ", m.Protocol))
		}
		rows = append(rows, append(row, printable(strings.Join(splitNUL(m.Tags), ","), "")))
	}
	return columns(rows)
}

// columns lays rows out at least four blanks apart, without trailing blanks.
func columns(rows [][]string) string {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], displayWidth(cell))
		}
	}

	var b strings.Builder
	for _, row := range rows {
		line := ""
		for i, cell := range row {
			line += cell + strings.Repeat(" ", widths[i]-displayWidth(cell)+4)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

// displayWidth is how many places s takes on a terminal: East Asian characters and emoji take two, marks that combine
// none (Unicode Standard Annex 11, in coarse ranges).
func displayWidth(s string) (width int) {
	for _, r := range s {
		switch {
		case unicode.In(r, unicode.Mn, unicode.Me):
		case r >= 0x1100 && isWide(r):
			width += 2
		default:
			width++
		}
	}
	return width
}

func isWide(r rune) bool {
	if unicode.In(r, unicode.Han, unicode.Hiragana, unicode.Katakana, unicode.Hangul) {
		return true
	}
	for _, wide := range [][2]rune{{0x2e80, 0x303e}, {0x3041, 0x33ff}, {0xfe30, 0xfe6f}, {0xff00, 0xff60}, {0xffe0, 0xffe6}, {0x1f300, 0x1faff}} {
		if r >= wide[0] && r <= wide[1] {
			return true
		}
	}
	return false
}

// memberJSON is a member as Serf shows it; what follows the status is of -detailed.
type memberJSON struct {
	Name     string            `json:"name"`
	Addr     string            `json:"addr"`
	Port     uint16            `json:"port"`
	Tags     map[string]string `json:"tags"`
	Status   string            `json:"status"`
	For      string            `json:"for,omitempty"`
	Version  string            `json:"version,omitempty"`
	Protocol uint8             `json:"protocol,omitempty"`
}

func membersJSON(members []memberStatus, detailed bool) string {
	var list []memberJSON // null where there is none, as Serf has it
	for _, m := range members {
		shown := memberJSON{Name: m.Name, Addr: m.Addr.String(), Port: m.Addr.Port(), Tags: m.Tags.asMap(), Status: m.Status.String()}
		if detailed {
			shown.For = m.since.Round(time.Second).String()
			shown.Version = m.Version
			shown.Protocol = m.Protocol
		}
		list = append(list, shown)
	}
	return toJSON(struct {
		Members []memberJSON `json:"members"`
	}{list})
}

// ---- watch ----

const watchExamples = `  {} watch
  {} watch -event member-failed,user:deploy
  {} watch -format json      one object a line, for programs
  {} watch -event user:done -n 1 -timeout 60s   wait for an event
`

func watchCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	asJSON := formatOption(fs)
	events := fs.String("event", "*", "what to show, `EVENT[,EVENT...]` as in -event-handler; 'member' is\n"+
		"who is there at the start")
	var count int
	var timeout time.Duration
	numberOption(fs, &count, "n", "end after `N` events, not counting who is there at first")
	durationOption(fs, &timeout, "timeout", "with -n: exit status 1 if it takes longer, a `DURATION`")

	return func([]string) error {
		kinds := strings.Split(*events, ",")
		if err := checkWatch(kinds, count, timeout); err != nil {
			return err
		}
		if timeout > 0 {
			time.AfterFunc(timeout, func() { exit(failf("", "fewer than %d events within %v", count, timeout)) })
		}

		seen := 0
		err := agent.call(rpcRequest{Op: "watch"}, rpcTimeout, func(a rpcResponse, us []update) error {
			text := droppedLine(a.Dropped, *asJSON)
			for _, u := range us {
				if !matches(kinds, a.Kind, u.Name) {
					continue
				}
				text += watchLine(a, u, *asJSON)
				if a.Kind != 0 { // a member that was there at the start is no event
					seen++
				}
			}
			if err := output(text); err != nil {
				return err
			}
			if count > 0 && seen >= count {
				return io.EOF
			}
			return nil
		})
		if err == nil && seen < count {
			return failf("", "the agent has ended: %d of %d events", seen, count)
		}
		return err
	}
}

// checkWatch says what is wrong with the options of watch.
func checkWatch(kinds []string, count int, timeout time.Duration) error {
	there := eventNames[0]
	onlyEvents := slices.DeleteFunc(slices.Clone(kinds), func(ev string) bool { return ev == there })
	if err := checkEvents(onlyEvents); err != nil {
		return usagef(fmt.Sprintf("'%s help watch' shows some", prog), "-event: %v", err)
	}
	if timeout > 0 && count == 0 {
		return usagef("for example: -n 1 -timeout 60s", "-timeout needs -n N")
	}
	if count > 0 && len(onlyEvents) == 0 {
		return usagef("", "-n counts events, and %q is none: it is who is there at the start", there)
	}
	return nil
}

// droppedLine says that this reader was too slow for that many lines.
func droppedLine(dropped int, asJSON bool) string {
	if dropped <= 0 {
		return ""
	}
	if asJSON {
		return toJSONLine(struct {
			Lost int `json:"lost"`
		}{dropped})
	}
	return fmt.Sprintf("(%d lines are missing here: this reader was too slow)\n", dropped)
}

// watchLine shows one event.
func watchLine(a rpcResponse, u update, asJSON bool) string {
	if asJSON {
		return watchJSON(a, u)
	}
	m := u.Member
	what := fmt.Sprintf("%s %s (from %s)", u.Name, u.Payload, m.Name)
	if a.Kind < eventUser {
		what = fmt.Sprintf("%s %s %s %s", m.Name, m.Addr, m.Status, strings.Join(splitNUL(m.Tags), ","))
	}
	if a.Kind == eventUpdate {
		what += fmt.Sprintf(" (%s)", a.Text)
	}
	at := time.Unix(0, a.At).Format("2006/01/02 15:04:05")
	return strings.TrimRight(fmt.Sprintf("%s %s: %s", at, a.Kind, printable(what, "")), " ") + "\n"
}

func watchJSON(a rpcResponse, u update) string {
	m := u.Member
	at := time.Unix(0, a.At).Format(time.RFC3339Nano)
	if a.Kind < eventUser {
		return toJSONLine(struct {
			Time   string            `json:"time"`
			Event  string            `json:"event"`
			Name   string            `json:"name"`
			Addr   string            `json:"addr"`
			Tags   map[string]string `json:"tags"`
			Status string            `json:"status"`
			Change string            `json:"changed,omitempty"`
		}{at, a.Kind.String(), m.Name, m.Addr.String(), m.Tags.asMap(), m.Status.String(), a.Text})
	}
	return toJSONLine(struct {
		Time    string `json:"time"`
		Event   string `json:"event"`
		Name    string `json:"name"`
		Payload string `json:"payload"`
		LTime   uint64 `json:"ltime"`
		From    string `json:"from"`
	}{at, a.Kind.String(), u.Name, string(u.Payload), u.LTime, m.Name})
}

// ---- query ----

const queryExamples = `  {} query load
  {} query -tag role=db master
  {} query -node web1 -node web2 -timeout 3s -format json health
`

func queryCommand(fs *flag.FlagSet) func([]string) error {
	agent := rpcOptions(fs)
	asJSON := formatOption(fs)
	filter := make(memberFilter)
	timeout := 15 * time.Second
	var nodes []string
	fs.Func("node", "ask only the member `NAME`; repeatable", func(name string) error {
		nodes = append(nodes, name)
		return validName(name) // an empty one would be nobody, and so ask all
	})
	fs.Func("tag", "ask only those with such a tag, `KEY=RE`; repeatable", filter.set("tag "))
	durationOption(fs, &timeout, "timeout", "the `DURATION` to wait for the slowest (default 15s)")
	noAck := fs.Bool("no-ack", false, "do not show who has the query")

	return func(args []string) error {
		if timeout > maxQueryTimeout {
			return usagef("", "-timeout is at most %v, not %v", maxQueryTimeout, timeout)
		}
		result := &queryResult{Responses: make(map[string]string), acked: make(map[string]bool), waiting: make(map[string]bool), noAck: *noAck}
		show := func(text string) error { return output(printable(text, "\n\t")) }
		if *asJSON {
			show = func(string) error { return nil } // programs get all at the end
		}
		req := rpcRequest{Op: "query", Name: args[0], Payload: []byte(argument(args, 1)), Timeout: timeout}
		if err := agent.query(req, nodes, filter, result, show); err != nil {
			return err
		}

		text := result.totals()
		if *asJSON {
			text = toJSON(result)
		}
		if err := output(text); err != nil {
			return err
		}
		if len(result.waiting) > 0 {
			return failf("'members' shows who is alive; -timeout sets how long to wait", "no answer from %s",
				strings.Join(slices.Sorted(maps.Keys(result.waiting)), ", "))
		}
		return nil
	}
}

// query asks the members that nodes and filter name (with neither, all of them), and shows what comes of it as it comes.
func (c *client) query(req rpcRequest, nodes []string, filter memberFilter, result *queryResult, show func(string) error) error {
	if len(filter) > 0 {
		members, err := c.members(filter, rpcTimeout)
		if err != nil {
			return err
		}
		living := aliveNames(members)
		if len(nodes) > 0 {
			living = slices.DeleteFunc(living, func(name string) bool { return !slices.Contains(nodes, name) })
		}
		if len(living) == 0 {
			return nil // everybody who was asked has answered
		}
		nodes = living
	}

	for _, name := range nodes { // a member that was named and is not there does not answer
		result.waiting[name] = true
	}
	req.Args = strings.Join(nodes, "\x00")
	dispatched := false
	return c.call(req, rpcTimeout, func(a rpcResponse, us []update) error {
		text := ""
		if a.Text != "" && !dispatched {
			text = fmt.Sprintf("Query '%s' dispatched\n", req.Name)
			dispatched = true
		}
		for _, name := range splitNUL(a.Text) { // the members that are asked
			result.waiting[name] = true
		}
		for _, u := range us {
			text += result.add(u.Member.Name, a.Reply, string(u.Payload))
		}
		return show(text)
	})
}

// queryResult is what has come of a query; as JSON it has the two keys of Serf's.
type queryResult struct {
	Acks      []string
	Responses map[string]string // the output of handlers that did well
	Failures  map[string]string `json:",omitempty"` // and of those that failed
	acked     map[string]bool   // those in Acks
	waiting   map[string]bool   // asked, and no answer yet
	noAck     bool
}

// add takes in what from says, and returns the lines to show for it.
func (r *queryResult) add(from string, reply reply, said string) string {
	text := ""
	if !r.noAck && !r.acked[from] { // a reply may overtake the acknowledgement
		r.acked[from] = true
		r.Acks = append(r.Acks, from)
		text = fmt.Sprintf("Ack from '%s'\n", from)
	}
	if reply == replyAck {
		return text
	}

	delete(r.waiting, from)
	switch reply {
	case replyDone:
		r.Responses[from] = said
		text += fmt.Sprintf("Response from '%s': %s\n", from, strings.TrimSuffix(said, "\n"))
	case replyFailed:
		if r.Failures == nil {
			r.Failures = make(map[string]string)
		}
		r.Failures[from] = said
		text += fmt.Sprintf("Failed on '%s': %s\n", from, strings.TrimSuffix(said, "\n"))
	}
	return text
}

func (r *queryResult) totals() string {
	text := ""
	if !r.noAck {
		text = fmt.Sprintf("Total Acks: %d\n", len(r.Acks))
	}
	return text + fmt.Sprintf("Total Responses: %d\n", len(r.Responses))
}

// ---- the agent ----

// agent is what the agent's options say; some need checking as the user wrote them.
type agent struct {
	gossip           gossipConfig
	handlers         handlerConfig
	bind             string
	advertise        string
	iface            string
	rpcAddr          string
	rpcAuth          string
	logLevel         string
	keys             []string
	tags             map[string]string
	leaveOnTerminate bool
	files            []string // of configuration, and folders of such
	folders          []string
	notes            []string // what was not understood, for the log
}

const agentExamples = `  {} agent
  {} agent -join 10.0.2.15
  {} agent -node web1 -role web -join seed1.example.com,seed2
  {} agent -log-level=debug -event-handler=./handler.sh
  {} agent -event-handler 'member-join,member-leave,member-failed=./lb.sh'
  {} agent -event-handler 'query:load=uptime'
  HAMLET_JOIN=seed1,seed2 HAMLET_TAG=role=web,zone=b {} agent

Every option can also be set in the environment: -log-level as HAMLET_LOG_LEVEL.
Lists are split on commas, or on newlines if there are any. A flag wins over the
environment, and that over files. '{} help handlers' tells what scripts get.

SIGINT (Ctrl-C) leaves the cluster gracefully. SIGTERM ends at once, so that the
others see this node fail. A second signal ends at once, with exit status 1.
SIGHUP reads the files and options again: handlers, tags, the log level and keys
change while the agent runs.

It works over lines with a round trip of up to 1.6 s that lose some per cent,
without a setting, since round trips are measured. Up to 300 ms, a death is
noticed about as fast as on a LAN.
`

func agentCommand(fs *flag.FlagSet) func([]string) error {
	newAgent(fs)

	return func([]string) error {
		if os.Getpid() == 1 {
			os.Exit(runAsInit())
		}
		return agentSource{os.Args[2:], os.Environ()}.run()
	}
}

// agentSource is where an agent's options come from. They are read at the start, and again at SIGHUP.
type agentSource struct {
	args    []string
	environ []string
}

// newAgent defines the agent's options on fs.
func newAgent(fs *flag.FlagSet) *agent {
	a := &agent{tags: make(map[string]string)}
	a.options(fs)
	return a
}

// read reads the options: a flag wins over the environment, and that over files. What is a list adds up.
func (src agentSource) read() (*agent, error) {
	fs := flag.NewFlagSet("agent", flag.ContinueOnError)
	a := newAgent(fs)
	if _, _, err := parseArgs(fs, src.args); err != nil {
		return nil, wrongUsage("agent", err)
	}
	unknown, err := setFromEnvironment(fs, src.environ)
	if err != nil {
		return nil, wrongUsage("agent", err)
	}
	if len(unknown) > 0 {
		a.notes = append(a.notes, fmt.Sprintf("there is no option %s: not looked at", strings.Join(unknown, ", ")))
	}
	if err := a.readFiles(fs); err != nil {
		return nil, err
	}
	if logLevelOf(a.logLevel) < 0 {
		return nil, usagef("", "-log-level: %q is none of %s", a.logLevel, strings.ToLower(strings.Join(levelNames, ", ")))
	}
	return a, nil
}

func (a *agent) options(fs *flag.FlagSet) {
	g, h := &a.gossip, &a.handlers
	g.reapAfter, h.timeout, h.grace = 24*time.Hour, 10*time.Minute, 3*time.Second
	fs.StringVar(&g.member.Name, "node", "", "its `NAME`, unique in the cluster (default: the host name)")
	fs.Func("role", "the same as -tag role=`ROLE`", setTag(a.tags, "role="))
	fs.Func("tag", "a tag `KEY=VALUE` that others see; repeatable", setTag(a.tags, ""))
	fs.StringVar(&a.bind, "bind", "", "`HOST:PORT` where to listen for gossip, UDP and TCP (default\n"+
		"0.0.0.0:7946; [::]:7946 where only IPv6 will do)")
	fs.StringVar(&a.advertise, "advertise", "", "the address that others are told, `HOST[:PORT]` (default: the one\n"+
		"from which packets to the first seed go out)")
	fs.StringVar(&a.iface, "iface", "", "advertise the address of the network interface `NAME`, also when\n"+
		"it changes")
	fs.StringVar(&a.rpcAddr, "rpc-addr", defaultRPC, "`HOST:PORT` of the RPC, for the other commands")
	fs.Func("rpc-auth", "a `TOKEN` that the other commands must give", secret(func(s string) { a.rpcAuth = s }))
	fs.Func("join", "a node to join, `HOST[:PORT]`, tried until it answers; repeatable, or\nseparated by commas", a.seed)
	fs.Func("retry-join", "the same as -join `HOST[:PORT]`; repeatable", a.seed)
	numberOption(fs, &g.retryMax, "retry-max", "give up after `N` rounds of trying: 10 take some 10 s, 70 some 80 s, each\n"+
		"further one up to 30 s (default: never)")
	fs.BoolVar(&g.replay, "replay", false, "run handlers for the remembered events of before its time, too")
	fs.Func("cluster", "nodes with another cluster `NAME` are not let in", secret(func(s string) { g.cluster = s }))
	fs.Func("encrypt", "a `KEY` from '{} keygen': only nodes with the key can read or join;\n"+
		"repeatable, or separated by commas: the first seals, all can open;\n"+
		"'none' among them stands for no encryption, while keys are introduced.\n"+
		"Others can see arguments: better set HAMLET_ENCRYPT", secret(func(s string) {
		a.keys = append(a.keys, strings.Split(s, ",")...)
	}))
	durationOption(fs, &g.reapAfter, "reap-after", "forget failed and left members after `DURATION` (default 24h)")
	fs.BoolVar(&a.leaveOnTerminate, "leave-on-terminate", false, "leave gracefully at SIGTERM, too")
	fs.Func("event-handler", "a script to run on events; repeatable. `SPEC` is SCRIPT or\n"+
		"EVENT[,EVENT...]=SCRIPT; an EVENT is member-join, member-leave,\n"+
		"member-failed, member-update, member-reap, user, user:NAME, query,\n"+
		"query:NAME or * (all of them)", func(s string) error { h.specs = append(h.specs, s); return nil })
	durationOption(fs, &h.timeout, "handler-timeout", "stop a script after `DURATION` (default 10m)")
	fs.StringVar(&a.logLevel, "log-level", "info", "`LEVEL` is trace, debug, info, warn or err")
	fs.Func("config-file", "read options from the JSON of `FILE`, as Serf's; repeatable", func(s string) error {
		a.files = append(a.files, s)
		return nil
	})
	fs.Func("config-dir", "read those of all *.json files in `DIR`; repeatable", func(s string) error {
		a.folders = append(a.folders, s)
		return nil
	})
}

func (a *agent) seed(s string) error {
	seeds := strings.Split(s, ",")
	a.gossip.seeds = append(a.gossip.seeds, seeds...)
	return checkAddrs(seeds)
}

// setFromEnvironment sets the options that were not given from their variables, and names the variables of none.
func setFromEnvironment(fs *flag.FlagSet, environ []string) (unknown []string, err error) {
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, kv := range environ {
		variable, text, _ := strings.Cut(kv, "=")
		name, ours := strings.CutPrefix(variable, "HAMLET_")
		if !ours {
			continue
		}

		name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
		if fs.Lookup(name) == nil {
			if !isServiceLink(variable, text) {
				unknown = append(unknown, variable)
			}
			continue
		}
		// Templates set all variables, also those that have no value. But an empty secret is one that is missing.
		meant := text != "" || keepsOthersOut(name)
		if meant && !given[name] && err == nil {
			err = setFromVariable(fs, variable, text, name)
		}
	}
	return unknown, err
}

// keepsOthersOut reports whether the option of that name is there to keep others out. Without a value that would
// silently not happen, so none is refused, wherever it comes from.
func keepsOthersOut(option string) bool {
	return slices.Contains([]string{"encrypt", "rpc-auth", "cluster"}, option)
}

// secret returns the way to take the value of an option that keeps others out.
func secret(set func(string)) func(string) error {
	return func(s string) error {
		if strings.TrimSpace(s) == "" {
			return errors.New("it is empty; leave it out altogether if there is to be none")
		}
		set(s)
		return nil
	}
}

// isServiceLink reports whether a variable was set by Kubernetes or by a Docker link, for a service or a container
// that is called hamlet or hamlet-something, and not by the user.
func isServiceLink(variable, text string) bool {
	if strings.HasSuffix(variable, "_PORT") && strings.Contains(text, "://") { // HAMLET_PORT=tcp://10.0.0.1:7946
		return true
	}
	if strings.HasSuffix(variable, "_NAME") && strings.HasPrefix(text, "/") { // HAMLET_NAME=/web/hamlet
		return true
	}
	is, _ := regexp.MatchString(`^HAMLET(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|`+
		`PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END|PORT_START|PORT_END))?|ENV_\w+)$`, variable)
	return is
}

// setFromVariable sets an option to the text of a variable, or to each item of it where the option is repeatable.
func setFromVariable(fs *flag.FlagSet, variable, text, name string) error {
	items, note := []string{text}, ""
	if slices.Contains([]string{"config-dir", "config-file", "encrypt", "event-handler", "join", "retry-join", "tag"}, name) {
		items = splitList(text)
	}
	if len(items) == 0 && keepsOthersOut(name) {
		items = []string{""} // which it refuses
	}
	if len(items) > 1 && name != "encrypt" && !strings.Contains(text, "\n") { // no error may show a key
		note = "; it is split at its commas: end it with a newline to have it split at newlines only"
	}
	for _, item := range items {
		err := fs.Set(name, item)
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

// serfKeys are the keys of Serf's configuration files whose option is called otherwise than the key with '-' for '_'.
var serfKeys = map[string]string{
	"node_name":          "node",
	"interface":          "iface",
	"encrypt_key":        "encrypt",
	"event_handlers":     "event-handler",
	"start_join":         "join",
	"retry_max_attempts": "retry-max",
	"replay_on_join":     "replay",
	"tombstone_timeout":  "reap-after",
	"tags":               "tag",
	"snapshot_path":      "snapshot",
	"rejoin_after_leave": "rejoin",
	"enable_syslog":      "syslog",
	"syslog_facility":    "syslog",
	"enable_compression": "disable-compression",
}

// readFiles sets the options that files give. What flags or the environment have set stays; tags, seeds and handlers are
// added to those.
func (a *agent) readFiles(fs *flag.FlagSet) error {
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, list := range []string{"tag", "role", "join", "retry-join", "event-handler"} {
		delete(given, list)
	}

	files := a.files
	for _, folder := range a.folders {
		entries, err := os.ReadDir(folder) // sorted by name
		if err != nil {
			return failf("", "-config-dir %s: %v", folder, reason(err))
		}
		for _, entry := range entries {
			if strings.HasSuffix(entry.Name(), ".json") {
				files = append(files, filepath.Join(folder, entry.Name()))
			}
		}
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return failf("", "-config-file %s: %v", file, reason(err))
		}
		if err := a.setFromJSON(fs, given, file, text); err != nil {
			return err
		}
	}
	return nil
}

// setFromJSON sets options from one file. What an earlier file has set and is no list is set anew.
func (a *agent) setFromJSON(fs *flag.FlagSet, given map[string]bool, file string, text []byte) error {
	var object map[string]any
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber() // which keeps the text of a number
	if err := decoder.Decode(&object); err != nil {
		line := 1 + bytes.Count(text[:decoder.InputOffset()], []byte("\n"))
		if se, ok := errors.AsType[*json.SyntaxError](err); ok {
			line = 1 + bytes.Count(text[:min(int(se.Offset), len(text))], []byte("\n"))
		}
		return failf("want an object, such as {\"node_name\": \"web1\"}", "%s: line %d: this is not JSON: %v", file, line, err)
	}

	for _, key := range slices.Sorted(maps.Keys(object)) {
		name, ok := serfKeys[key]
		if !ok {
			name = strings.ReplaceAll(key, "_", "-")
		}
		if fs.Lookup(name) == nil {
			a.notes = append(a.notes, unknownKey(file, key, name))
			continue
		}
		values := optionTexts(object[key])
		if len(values) == 0 && keepsOthersOut(name) {
			values = []string{""} // which it refuses
		}
		for _, value := range values {
			if given[name] || a.hasTag(name, value) {
				continue
			}
			if err := setOption(fs, name, value); err != nil {
				return failf("", "%s: %s: %v", file, key, err)
			}
		}
	}
	return nil
}

// optionTexts is a JSON value as options take it: each item of a list, KEY=VALUE for each item of an object.
func optionTexts(value any) (texts []string) {
	switch value := value.(type) {
	case nil:
	case []any:
		for _, item := range value {
			texts = append(texts, optionTexts(item)...)
		}
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(value)) {
			texts = append(texts, fmt.Sprintf("%s=%v", key, value[key]))
		}
	default:
		texts = append(texts, fmt.Sprint(value))
	}
	return texts
}

// hasTag reports whether a flag or the environment has set the tag that this option is about.
func (a *agent) hasTag(option, value string) bool {
	key := "role"
	if option == "tag" {
		key, _, _ = strings.Cut(value, "=")
	} else if option != "role" {
		return false
	}
	_, ok := a.tags[key]
	return ok
}

// unknownKey is what the log says of a key in a file that is no option.
func unknownKey(file, key, option string) string {
	if instead, ok := serfIgnored[option]; ok {
		return fmt.Sprintf("%s: %q has no effect: %s", file, key, instead)
	}
	if advice := serfAdvice("-" + option); advice != "" {
		return fmt.Sprintf("%s: hamlet has no %q: %s", file, key, advice)
	}
	return fmt.Sprintf("%s: there is no option %q: it is not looked at", file, key)
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
	cfg.bind, err = a.bindAddress()
	if err != nil {
		return "", err
	}
	if cfg.keys, err = parseKeys(a.keys); err != nil {
		return "", usagef(fmt.Sprintf("'%s keygen' makes a key", prog), "-encrypt: %v", err)
	}
	cfg.moves = cfg.bind.Addr().IsUnspecified() && a.advertise == ""
	cfg.iface = a.iface
	return a.chooseAddress()
}

// chooseAddress chooses the address to advertise. Where it may become known later, a stopgap is taken until then.
func (a *agent) chooseAddress() (why string, err error) {
	cfg := &a.gossip
	ctx, cancel := context.WithTimeout(context.Background(), startPatience)
	defer cancel()
	cfg.member.Addr, why, err = a.advertised(ctx)
	f, _ := errors.AsType[*failure](err)
	if f == nil || !f.retriable {
		return why, err
	}
	cfg.awaits = f.msg
	_, port, _ := hostPort(a.advertise, fmt.Sprint(cfg.bind.Port()))
	cfg.member.Addr = netip.MustParseAddrPort(net.JoinHostPort("127.0.0.1", port))
	return "it is not known yet", nil
}

// awaitAddress waits until the address to advertise is known, and has the agent join then.
func (a *agent) awaitAddress(g *gossip) {
	a.gossip.log.printf(levelWarn, "%s: this node joins as soon as it has an address to advertise", a.gossip.awaits)
	for {
		addr, _, err := a.advertised(g.ctx)
		if err == nil {
			g.addressKnown(addr.Addr())
			return
		}
		select {
		case <-time.After(addressPoll):
		case <-g.ctx.Done():
			return
		}
	}
}

// parseKeys decodes the keys. Its errors never show a key.
func parseKeys(list []string) (keys [][]byte, err error) {
	for i, s := range list {
		if s == "none" {
			keys = append(keys, noKey)
			continue
		}
		key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("key %d of %d is not base64", i+1, len(list))
		}
		if len(key) != 16 && len(key) != 24 && len(key) != 32 {
			return nil, fmt.Errorf("key %d of %d has %d bytes, a key has 32, 24 or 16", i+1, len(list), len(key))
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// runningAgent is an agent that runs, and what it can change while it does.
type runningAgent struct {
	source   agentSource
	started  agent // the options as they were read at the start
	lastRead *agent
	gossip   *gossip
	handlers *handlers
	logs     *logWriter
	ended    chan struct{} // closed when all has ended
}

// run runs the agent until it is told to stop.
func (src agentSource) run() error {
	a, err := src.read()
	if err != nil {
		return err
	}
	logs := newLogWriter(logLevelOf(a.logLevel))
	a.gossip.member.Version = version
	a.handlers.log = logs.log
	a.gossip.log = logs.log
	started := *a // check completes what was read
	why, err := a.check()
	if err != nil {
		return err
	}

	ln, err := a.listenRPC()
	if err != nil {
		return err
	}
	signals := prepareProcess() // only now: until here a signal ends the process, however long a resolver takes
	handlers, err := newHandlers(a.handlers)
	if err != nil {
		return usagef(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.otherPort = uint16(ln.Addr().(*net.TCPAddr).Port)
	a.gossip.events = handlers.deliver
	g, err := newGossip(a.gossip)
	if err != nil {
		return startFailure("gossip", "-bind", a.gossip.bind.String(), err)
	}
	handlers.env = func() []string {
		self, alone := g.self()
		return handlerEnv(self, alone, ln.Addr().String(), a.rpcAuth)
	}
	r := &runningAgent{src, started, &started, g, handlers, logs, make(chan struct{})}

	go g.loop()
	a.banner(g, why, ln.Addr())
	if a.gossip.awaits != "" {
		go a.awaitAddress(g)
	}
	for _, note := range a.notes {
		logger(logs.log).printf(levelWarn, "%s", note)
	}
	logs.pumping.Go(logs.pump)
	defer logs.flush()
	rpc := serveRPC(ln, g, a.rpcAuth, r.info)
	go func() {
		<-g.done
		rpc.close()
		handlers.close(g.last...)
		close(r.ended)
	}()
	return r.wait(signals)
}

func (a *agent) listenRPC() (net.Listener, error) {
	addr, err := rpcAddr(a.rpcAddr)
	if err != nil {
		return nil, err
	}
	ap, _ := netip.ParseAddrPort(addr) // zero where it is a host by name
	ln, err := net.Listen("tcp"+family(ap.Addr()), addr)
	if err != nil {
		return nil, startFailure("the RPC", "-rpc-addr", addr, err)
	}
	return ln, nil
}

// reload reads the options again, and changes what can change while the agent runs. An error changes nothing.
func (r *runningAgent) reload() error {
	a, err := r.source.read()
	if err != nil {
		return err
	}
	keys, err := parseKeys(a.keys)
	if err != nil {
		return fmt.Errorf("-encrypt: %w", err)
	}
	if _, err := makeTags(a.tags); err != nil {
		return fmt.Errorf("-tag: %w", err)
	}
	if err := r.handlers.reload(a.handlers); err != nil {
		return err
	}

	for _, note := range a.notes {
		if !slices.Contains(r.lastRead.notes, note) {
			logger(r.logs.log).printf(levelWarn, "%s", note)
		}
	}
	if fixed := r.started.fixedChanges(a); len(fixed) > 0 {
		logger(r.logs.log).printf(levelWarn, "only a restart changes -%s", strings.Join(fixed, ", -"))
	}
	r.logs.level.Store(int32(logLevelOf(a.logLevel)))
	r.gossip.setKeys(keys)
	set, remove := tagChanges(r.lastRead.tags, a.tags)
	r.lastRead = a
	return r.gossip.run(func(n *node) error { return n.identity.setTags(n, set, remove) })
}

// tagChanges is what leads from one set of tags to another. What the tags command has changed meanwhile stays.
func tagChanges(was, is map[string]string) (set map[string]string, remove []string) {
	set = make(map[string]string)
	for key, value := range is {
		if old, ok := was[key]; !ok || old != value {
			set[key] = value
		}
	}
	for key := range was {
		if _, ok := is[key]; !ok {
			remove = append(remove, key)
		}
	}
	return set, remove
}

// fixedChanges names the options that differ in b, and cannot change while the agent runs.
func (a *agent) fixedChanges(b *agent) (names []string) {
	for _, option := range []struct{ name, a, b string }{
		{"advertise", a.advertise, b.advertise},
		{"bind", a.bind, b.bind},
		{"cluster", a.gossip.cluster, b.gossip.cluster},
		{"iface", a.iface, b.iface},
		{"join", strings.Join(a.gossip.seeds, ","), strings.Join(b.gossip.seeds, ",")},
		{"leave-on-terminate", fmt.Sprint(a.leaveOnTerminate), fmt.Sprint(b.leaveOnTerminate)},
		{"node", a.gossip.member.Name, b.gossip.member.Name},
		{"reap-after", a.gossip.reapAfter.String(), b.gossip.reapAfter.String()},
		{"replay", fmt.Sprint(a.gossip.replay), fmt.Sprint(b.gossip.replay)},
		{"retry-max", fmt.Sprint(a.gossip.retryMax), fmt.Sprint(b.gossip.retryMax)},
		{"rpc-addr", a.rpcAddr, b.rpcAddr},
		{"rpc-auth", a.rpcAuth, b.rpcAuth},
	} {
		if option.a != option.b {
			names = append(names, option.name)
		}
	}
	return names
}

// prepareProcess fits the process to an agent, and returns the signals that it gets.
func prepareProcess() <-chan os.Signal {
	os.Unsetenv("HAMLET_ENCRYPT") // handlers have no use for it
	debug.SetTraceback("crash")   // a panic ends with SIGABRT, and never with 2, after which systemd would not start it again
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
`, self.Name, g.udp.LocalAddr(), self.Addr, why, rpc, a.gossip.sealsWithKey())
	switch ip := self.Addr.Addr(); {
	case a.gossip.awaits != "": // which is told
	case ip.IsLoopback() && a.gossip.moves: // the user did not choose it
		remedy := "-advertise sets one"
		if ips, _ := addressesOf(""); !bestAddress(ips, netip.IPv6Unspecified()).Is4() && a.gossip.bind.Addr().Is4() {
			remedy = fmt.Sprintf("-bind [::]:%d takes IPv6 as well", a.gossip.bind.Port())
		}
		a.gossip.log.printf(levelWarn, "advertising %s, which other machines cannot reach: %s (%s)", self.Addr, why, remedy)
	case !a.gossip.sealsWithKey() && !isPrivate(ip):
		a.gossip.log.printf(levelWarn, "%s is a public address, and there is no key: "+
			"whoever reaches it can join and lie (-encrypt sets one)", self.Addr)
	}
	if ip := rpc.(*net.TCPAddr).IP; !ip.IsLoopback() && a.rpcAuth == "" {
		a.gossip.log.printf(levelWarn, "the RPC listens on %s without a token: whoever reaches it controls this agent "+
			"(-rpc-auth sets one)", rpc)
	}
}

// info is what the agent knows of itself: group, key, value; and so on.
func (r *runningAgent) info() (facts []string) {
	add := func(group, key string, value any) { facts = append(facts, group, key, fmt.Sprint(value)) }
	self, _ := r.gossip.self()
	add("agent", "name", self.Name)
	add("agent", "addr", self.Addr)
	add("agent", "version", version)
	add("agent", "protocol", protocolVersion)
	add("agent", "uptime", time.Since(r.gossip.start).Round(time.Second))

	add("event_handlers", "", "")
	facts = append(facts, r.handlers.info()...)

	add("runtime", "arch", runtime.GOARCH)
	add("runtime", "cpu_count", runtime.NumCPU())
	add("runtime", "goroutines", runtime.NumGoroutine())
	add("runtime", "max_procs", runtime.GOMAXPROCS(0))
	add("runtime", "os", runtime.GOOS)
	add("runtime", "version", runtime.Version())

	sealer := r.gossip.acceptor.sealer.Load()
	add("serf", "encrypted", sealer.sealsWithKey())
	add("serf", "keys", len(sealer.keys))
	for i, key := range sealer.keys {
		add("serf", fmt.Sprintf("key_%d", i+1), fingerprint(key))
	}
	r.gossip.run(func(n *node) error {
		facts = append(facts, n.info()...)
		return nil
	})

	add("tags", "", "")
	for _, tag := range splitNUL(self.Tags) {
		key, value, _ := strings.Cut(tag, "=")
		add("tags", key, value)
	}
	return facts
}

// wait returns when the agent has ended: told by a signal, by the leave command, or by itself.
func (r *runningAgent) wait(signals <-chan os.Signal) error {
	var told time.Time // to stop
	for {
		select {
		case <-r.ended:
			if errors.Is(r.gossip.err, errNameTaken) {
				return failf("choose another name with -node", "%v", r.gossip.err)
			}
			return r.gossip.err
		case s := <-signals:
			if s == syscall.SIGHUP {
				r.hangUp()
				continue
			}
			if !told.IsZero() && time.Since(told) > sameSignal {
				return failf("", "%v while stopping: ended at once", s)
			}
			if told.IsZero() {
				told = time.Now()
				r.stop(s)
			}
		}
	}
}

func (r *runningAgent) hangUp() {
	if err := r.reload(); err != nil {
		logger(r.logs.log).printf(levelErr, "nothing is changed, since the options cannot be read again: %v", err)
		return
	}
	logger(r.logs.log).printf(levelInfo, "hangup: read the options again")
}

// stop begins to end the agent, in the way that the signal asks for.
func (r *runningAgent) stop(s os.Signal) {
	if s == os.Interrupt || s == syscall.SIGTERM && r.started.leaveOnTerminate {
		logger(r.logs.log).printf(levelInfo, "%v: leaving the cluster, a second signal ends at once", s)
		go r.gossip.leave()
		return
	}
	logger(r.logs.log).printf(levelInfo, "%v: ending without leaving", s)
	go r.gossip.close() // peers notice at once; handlers get their grace
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

// lookup is an answer of the system's resolver.
type lookup struct {
	addrs []netip.AddrPort
	err   error
}

// lookUp looks up HOST[:PORT]; port stands in for a missing one. A and AAAA records are asked for separately, and each
// answer comes as soon as it is there. The resolver takes as long as it takes: only ctx ends it. After the last answer
// the channel is closed.
func lookUp(ctx context.Context, s, port string) <-chan lookup {
	answers := make(chan lookup, 2)
	host, port, err := hostPort(s, port)
	if err != nil {
		answers <- lookup{err: err}
		close(answers)
		return answers
	}
	complete := func(ip netip.Addr) netip.AddrPort {
		return netip.MustParseAddrPort(net.JoinHostPort(ip.Unmap().String(), port))
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		answers <- lookup{addrs: []netip.AddrPort{complete(ip)}}
		close(answers)
		return answers
	}

	var both sync.WaitGroup
	for _, family := range []string{"ip4", "ip6"} {
		both.Go(func() {
			ips, err := net.DefaultResolver.LookupNetIP(ctx, family, host)
			l := lookup{err: lookupError(err)}
			for _, ip := range ips {
				l.addrs = append(l.addrs, complete(ip))
			}
			answers <- l
		})
	}
	go func() {
		both.Wait()
		close(answers)
	}()
	return answers
}

// lookupError says in plain words why a name has no address.
func lookupError(err error) error {
	dns, _ := errors.AsType[*net.DNSError](err)
	switch {
	case dns == nil || errors.Is(err, context.Canceled):
		return err
	case dns.IsNotFound:
		return errors.New("no such host")
	case dns.Server != "":
		return fmt.Errorf("no usable answer from the name server %s", dns.Server)
	}
	return errors.New("the name cannot be looked up")
}

// lookUpOne returns an address of s that fits, an IPv4 one where there is a choice. The error says that s has none.
func lookUpOne(ctx context.Context, s, port string, fits func(netip.Addr) bool) (addr netip.AddrPort, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = errors.New("it has no address that fits")
	for l := range lookUp(ctx, s, port) {
		if l.err != nil && !addr.IsValid() {
			err = l.err
		}
		for _, found := range l.addrs {
			better := !addr.IsValid() || found.Addr().Is4() && !addr.Addr().Is4()
			if better && fits(found.Addr()) {
				addr = found
			}
		}
		if addr.Addr().Is4() {
			break
		}
	}
	if addr.IsValid() {
		return addr, nil
	}
	return addr, err
}

// bindAddress returns the address to listen on.
func (a *agent) bindAddress() (bind netip.AddrPort, err error) {
	wrong := usagef("-bind takes HOST:PORT, such as 0.0.0.0:7946 or [::1]:7946",
		"-bind: %q is not an address to listen on", a.bind)
	host, port, err := hostPort(a.bind, defaultPort)
	if err != nil {
		return bind, wrong
	}
	if host == "" {
		host = "0.0.0.0"
		if a.needsIPv6() {
			host = "::" // which takes IPv4 as well
		}
	}

	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsMulticast() {
			return bind, wrong
		}
		return netip.ParseAddrPort(net.JoinHostPort(ip.Unmap().String(), port))
	}
	isName := strings.ContainsFunc(host, unicode.IsLetter) && !strings.Contains(host, ":")
	if !isName {
		return bind, wrong
	}
	isOwn := func(ip netip.Addr) bool { return ip.IsLoopback() || isOwnAddress(ip) }
	bind, err = lookUpOne(context.Background(), host, port, isOwn)
	if err != nil {
		err = failf("-bind takes HOST:PORT; HOST must be, or resolve to, an address of this machine",
			"-bind: cannot listen on %q: %v", a.bind, err)
	}
	return bind, err
}

// needsIPv6 reports whether an agent that may listen anywhere has to listen on IPv6: it is told an IPv6 address, or has no other.
func (a *agent) needsIPv6() bool {
	for _, s := range append(slices.Clone(a.gossip.seeds), a.advertise) {
		host, _, _ := hostPort(s, defaultPort)
		if ip, err := netip.ParseAddr(host); err == nil && ip.Unmap().Is6() {
			return true
		}
	}
	all, _ := addressesOf("")
	own, _ := addressesOf(a.iface)
	is4 := func(ip netip.Addr) bool { return ip.Is4() && !ip.IsLoopback() }
	return !slices.ContainsFunc(own, is4) && slices.ContainsFunc(all, netip.Addr.Is6)
}

// advertised returns the address that others are told, and the reason. It is never a wildcard, and loopback only if that
// is asked for or if there is nothing else. An error whose failure is retriable may come right by itself.
func (a *agent) advertised(ctx context.Context) (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	switch {
	case a.advertise != "" && a.iface != "":
		return addr, "", usagef("give one of them", "-advertise %s and -iface %s", a.advertise, a.iface)
	case a.advertise != "":
		return a.namedAddress(ctx)
	case a.iface != "":
		return a.interfaceAddress()
	case !bind.Addr().IsUnspecified():
		return bind, "the bound address", nil
	}
	ip, why := routeAddress(a.gossip.seeds, bind.Addr())
	return netip.AddrPortFrom(ip, bind.Port()), why, nil
}

// namedAddress is the address of -advertise.
func (a *agent) namedAddress(ctx context.Context) (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	host, _, err := hostPort(a.advertise, fmt.Sprint(bind.Port()))
	if err != nil {
		return addr, "", usagef("-advertise takes HOST or HOST:PORT", "-advertise: %v", err)
	}
	addr, err = lookUpOne(ctx, a.advertise, fmt.Sprint(bind.Port()), func(ip netip.Addr) bool {
		return !ip.IsUnspecified() && !ip.IsMulticast() && sameFamily(ip, bind.Addr())
	})
	if err == nil {
		return addr, "set with -advertise", nil
	}
	if _, notIP := netip.ParseAddr(host); notIP == nil {
		return addr, "", usagef("-advertise takes HOST or HOST:PORT; -bind [::]:7946 takes IPv4 and IPv6",
			"-advertise %q: no address at which others could reach %s", a.advertise, bind)
	}
	return addr, "", &failure{msg: fmt.Sprintf("-advertise %q: %v", a.advertise, err), code: 1, retriable: true}
}

// interfaceAddress is the address of -iface.
func (a *agent) interfaceAddress() (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	ips, err := addressesOf(a.iface)
	if err != nil {
		return addr, "", failf("-iface takes the name of an interface", "-iface: there is no interface %q", a.iface)
	}
	if !bind.Addr().IsUnspecified() {
		if !slices.Contains(ips, bind.Addr()) {
			return addr, "", failf("leave one of them out, or give an address of the interface with -bind",
				"-iface %s and -bind %s: the interface does not have that address", a.iface, bind)
		}
		return bind, "the bound address, of " + a.iface, nil
	}
	ip := bestAddress(ips, bind.Addr())
	if !ip.IsValid() {
		return addr, "", &failure{msg: fmt.Sprintf("-iface: %s has no address yet at which others could reach %s", a.iface, bind),
			code: 1, retriable: true}
	}
	return netip.AddrPortFrom(ip, bind.Port()), "address of " + a.iface, nil
}

// routeAddress asks the kernel which address of this machine leads to the seeds that are given as addresses, then to
// the rest of the world. Names are not looked up here: the first seed that answers settles it.
func routeAddress(seeds []string, bind netip.Addr) (ip netip.Addr, why string) {
	for _, s := range seeds {
		host, _, _ := hostPort(s, defaultPort)
		seed, err := netip.ParseAddr(host)
		if err != nil {
			continue
		}
		ip = sourceTo(seed)
		if isReachable(ip, bind) {
			return ip, fmt.Sprintf("source address of the route to %s", seed.Unmap())
		}
		if seed.Zone() == "" {
			continue
		}
		// A link-local IPv6 address means nothing elsewhere: another one of that interface has to do.
		ips, _ := addressesOf(seed.Zone())
		ip = bestAddress(ips, bind)
		if ip.IsValid() {
			return ip, "address of " + seed.Zone()
		}
	}
	for _, far := range []string{"198.51.100.1", "2001:db8::1"} { // reserved for documentation, so never near
		ip = sourceTo(netip.MustParseAddr(far))
		if isReachable(ip, bind) {
			return ip, "source address of the default route"
		}
	}

	var linkLocal netip.Addr // others on its network can be reached by it, but any other address is better
	ifcs, _ := net.Interfaces()
	for _, ifc := range ifcs {
		if ifc.Flags&net.FlagUp == 0 {
			continue
		}
		addrs, _ := ifc.Addrs()
		ip := bestAddress(ipsOf(addrs), bind)
		if usable(ip, bind) {
			return ip, "address of " + ifc.Name
		}
		if ip.IsValid() && !linkLocal.IsValid() {
			linkLocal = ip
			why = "address of " + ifc.Name
		}
	}
	if linkLocal.IsValid() {
		return linkLocal, why
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}), "no other address was found" // which [::] takes as well
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

// addressesOf are the addresses of an interface; of all for "".
func addressesOf(iface string) (ips []netip.Addr, err error) {
	if iface == "" {
		addrs, err := net.InterfaceAddrs()
		return ipsOf(addrs), err
	}
	ifc, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, err
	}
	addrs, err := ifc.Addrs()
	return ipsOf(addrs), err
}

// ipsOf drops from addresses of interfaces the length of their network.
func ipsOf(addrs []net.Addr) (ips []netip.Addr) {
	for _, a := range addrs {
		prefix, _ := netip.ParsePrefix(a.String())
		ips = append(ips, prefix.Addr().Unmap())
	}
	return ips
}

// bestAddress is the address among ips to tell others; the zero one if there is none.
func bestAddress(ips []netip.Addr, bind netip.Addr) netip.Addr {
	for _, fits := range []func(ip, bind netip.Addr) bool{usable, isReachable} {
		for _, ip := range ips {
			if fits(ip, bind) {
				return ip
			}
		}
	}
	return netip.Addr{}
}

// followInterface is the address to advertise of an interface: own as long as it has that.
func followInterface(iface string, own, bind netip.Addr) netip.Addr {
	ips, _ := addressesOf(iface)
	if slices.Contains(ips, own) {
		return own
	}
	return bestAddress(ips, bind)
}

// onOneInterface reports whether both are addresses of the same interface.
func onOneInterface(x, y netip.Addr) bool {
	if x == y {
		return true
	}
	ifcs, _ := net.Interfaces()
	return slices.ContainsFunc(ifcs, func(ifc net.Interface) bool {
		addrs, _ := ifc.Addrs()
		ips := ipsOf(addrs)
		return slices.Contains(ips, x) && slices.Contains(ips, y)
	})
}

// usable reports whether other machines may reach ip at a socket bound to bind.
func usable(ip, bind netip.Addr) bool {
	return ip.IsGlobalUnicast() && ip.Zone() == "" && sameFamily(ip, bind)
}

// isReachable reports whether the machines of some network may reach ip at a socket bound to bind: it is usable, or
// a link-local address of IPv4. One of IPv6 is of use only with the name of an interface, which other machines do not share.
func isReachable(ip, bind netip.Addr) bool {
	return usable(ip, bind) || ip.Is4() && ip.IsLinkLocalUnicast() && sameFamily(ip, bind)
}

// isPrivate reports whether ip is one that the Internet does not route: also those of RFC 6598, which carriers,
// clouds and VPNs use as private ones.
func isPrivate(ip netip.Addr) bool {
	shared := netip.MustParsePrefix("100.64.0.0/10")
	return ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || shared.Contains(ip)
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
	ips, err := addressesOf("")
	return err != nil || !ip.IsLoopback() && slices.Contains(ips, ip)
}

// ---- the log ----

// logLevelOf is the level of a name in any case; -1: there is none.
func logLevelOf(name string) logLevel {
	return logLevel(slices.Index(levelNames, strings.ToUpper(name)))
}

// logWriter writes log lines of a level and above to stderr. It never blocks: a terminal that was halted must not halt
// the agent. Until pump runs, lines wait.
type logWriter struct {
	level     atomic.Int32
	lines     chan string // "" is the end
	dropped   atomic.Int64
	pumping   sync.WaitGroup
	toJournal bool
}

func newLogWriter(level logLevel) *logWriter {
	w := &logWriter{lines: make(chan string, 1024), toJournal: underJournal()}
	w.level.Store(int32(level))
	return w
}

// log takes one line.
func (w *logWriter) log(l logLine) {
	if l.level < logLevel(w.level.Load()) {
		return
	}
	select {
	case w.lines <- formatLine(l, w.toJournal):
	default:
		w.dropped.Add(1)
	}
}

// formatLine is a line as it is written. The journal has a date of its own, and takes a priority in front (sd-daemon(3)).
func formatLine(l logLine, toJournal bool) string {
	// What spans lines, as the output of a script, is indented: none of it can pass for a line of the log.
	text := strings.ReplaceAll(printable(strings.TrimSuffix(l.String(), "\n"), "\n\t"), "\n", "\n\t") + "\n"
	if !toJournal {
		return time.Now().Format("2006/01/02 15:04:05 ") + text
	}
	priorities := [...]int{levelTrace: 7, levelDebug: 7, levelInfo: 6, levelWarn: 4, levelErr: 3}
	return fmt.Sprintf("<%d>%s", priorities[l.level], text)
}

// underJournal reports whether stderr goes to systemd's journal, which JOURNAL_STREAM names by device and inode
// (systemd.exec(5)).
func underJournal() bool {
	var stderr syscall.Stat_t
	if syscall.Fstat(2, &stderr) != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", stderr.Dev, stderr.Ino)
}

func (w *logWriter) pump() {
	for line := <-w.lines; line != ""; line = <-w.lines {
		os.Stderr.WriteString(line)
		if n := w.dropped.Swap(0); n > 0 {
			lost := logLine{levelWarn, fmt.Sprintf("%d log lines were lost here: nobody took them in time", n)}
			os.Stderr.WriteString(formatLine(lost, w.toJournal))
		}
	}
}

// flush writes what is left, for two seconds at most.
func (w *logWriter) flush() {
	waitAtMost(2*time.Second, func() {
		w.lines <- ""
		w.pumping.Wait()
	})
}
