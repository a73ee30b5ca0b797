// main.go: what a user types and sees: the commands with their options, help, output and errors, addresses, the
// log, and the wiring of an agent.

package main

import (
	"bytes"
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
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const version = "0.2.0"

// handlersPage is the contract between agent and handlers, as 'help handlers' shows it.
//
//go:embed docs/handlers.md
var handlersPage string

// helpPages are the help, and that of each command; {} stands for the program's name.
//
//go:embed docs/commands.txt
var helpPages string

var prog = filepath.Base(os.Args[0]) // the name that the program was called by

const (
	defaultPort    = "7946"
	defaultRPCPort = "7373"
	defaultRPC     = "127.0.0.1:" + defaultRPCPort
	keySize        = 32 // of a new key
	rpcTimeout     = 5 * time.Second
	slowTimeout    = 20 * time.Second // a join or a leave takes the agent itself up to fifteen
	startPatience  = time.Second      // how long the banner waits for the name of -advertise
	handlerGrace   = 3 * time.Second  // what handlers have to end in when the agent stops
	addressPoll    = 500 * ms         // between looks whether there is an address to advertise now
	logTime        = "2006/01/02 15:04:05"
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

// notYetf makes a failure of what may come right by itself.
func notYetf(format string, args ...any) error {
	return &failure{msg: fmt.Sprintf(format, args...), code: 1, retriable: true}
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
		if err := output(help("help")); err != nil {
			return err
		}
		return usagef("", "no command given")
	case "help", "-h", "-help", "--help":
		if len(args) == 0 || args[0] == "help" {
			return output(help("help"))
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
			err := c.run(newOptions(c, args, os.Environ()))
			if errors.Is(err, flag.ErrHelp) {
				return output(help(name))
			}
			return err
		}
		names = append(names, c.name)
	}
	if err := serfHas(name); err != nil {
		return err
	}
	hint := fmt.Sprintf("'%s help' lists the commands; '%s agent' starts a node", prog, prog)
	if near := nearest(name, names); near != "" {
		hint = fmt.Sprintf("did you mean '%s %s'? %s", prog, near, hint)
	}
	return usagef(hint, "there is no command %q", name)
}

// ---- commands and options ----

// command is one command.
type command struct {
	name string
	args string // what follows the options: WORD, [WORD] or WORD...
	run  func(*options) error
}

// commands are all commands. Their help stands in docs/commands.txt.
func commands() []command {
	return []command{
		{"agent", "", agentCommand},
		{"members", "", membersCommand},
		{"watch", "", watchCommand},
		{"query", "NAME [PAYLOAD]", queryCommand},
		{"info", "", infoCommand},
		{"tags", "", tagsCommand},
		{"event", "NAME [PAYLOAD]", eventCommand},
		{"join", "ADDR...", joinCommand},
		{"leave", "", leaveCommand},
		{"force-leave", "NAME", forceLeaveCommand},
		{"keygen", "", keygenCommand},
		{"version", "", versionCommand},
	}
}

// options are the options and arguments of a command. The command defines its options in flags, and then parses.
type options struct {
	command command
	flags   *flag.FlagSet
	typed   []string            // options and arguments
	environ []string            // which has further options of the agent
	args    []string            // the arguments
	set     map[string][]string // what each option was set to
	notes   []string            // what was not understood, for the user or the log
}

func newOptions(c command, typed, environ []string) *options {
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	return &options{command: c, flags: flags, typed: typed, environ: environ, set: make(map[string][]string)}
}

// parse sets the options and arguments from what was typed, and the agent's options from the environment as well.
func (o *options) parse() error {
	isAgent := o.command.name == "agent"
	err := o.parseOptions()
	if err == nil {
		err = o.checkArgs()
	}
	if err == nil && isAgent {
		err = o.setFromEnvironment()
	}
	_, isComplete := errors.AsType[*failure](err)
	if err != nil && !isComplete && err != flag.ErrHelp {
		hint := fmt.Sprintf("'%s help %s' shows how to use it", prog, o.command.name)
		return usagef(hint, "%s: %v", o.command.name, err)
	}
	if err != nil {
		return err
	}
	if isAgent { // which has a log, and its own way with signals
		return nil
	}

	for _, note := range o.notes {
		fmt.Fprint(os.Stderr, formatLine(logLine{levelWarn, note}, underJournal()))
	}
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGQUIT) // Go would print stacks
	go func() {
		<-quit
		os.Exit(128 + int(syscall.SIGQUIT))
	}()
	return nil
}

// parseOptions sets options wherever they stand. All else that was typed are arguments.
func (o *options) parseOptions() error {
	typed := o.typed
	for len(typed) > 0 {
		word := typed[0]
		typed = typed[1:]
		if word == "--" { // after which nothing is an option
			o.args = append(o.args, typed...)
			return nil
		}

		// Behind an argument, what looks like an option and is none is an argument, too: a payload may be "-5".
		name, value, hasValue := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-"), "=")
		instead, isSerfs := serfIgnored[name]
		isKnown := o.flags.Lookup(name) != nil || isSerfs
		looksLikeOption := len(word) > 1 && word[0] == '-'
		if !looksLikeOption || !isKnown && len(o.args) > 0 {
			o.args = append(o.args, word)
			continue
		}
		if !isKnown {
			return o.unknownOption(name)
		}

		switch {
		case hasValue:
		case o.isSwitch(name):
			value = "true"
		case len(typed) == 0:
			return fmt.Errorf("-%s needs a value", name)
		default:
			value = typed[0]
			typed = typed[1:]
		}
		if isSerfs {
			o.notes = append(o.notes, fmt.Sprintf("-%s has no effect: %s", name, instead))
			continue
		}
		if err := o.setOption("-"+name, name, value); err != nil {
			return err
		}
	}
	return nil
}

// isSwitch reports whether an option, ours or one of Serf's, stands without a value.
func (o *options) isSwitch(name string) bool {
	option := o.flags.Lookup(name)
	if option == nil {
		return slices.Contains([]string{"disable-compression", "rejoin", "syslog"}, name)
	}
	b, ok := option.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// keepsOthersOut reports whether the option of that name is there to keep others out of the agent. Without a value
// that would silently not happen, so none is refused, wherever it comes from.
func (o *options) keepsOthersOut(option string) bool {
	return o.command.name == "agent" && slices.Contains([]string{"encrypt", "rpc-auth", "cluster"}, option)
}

// setOption sets an option to values that came from source: a flag, a variable or a key of a file.
func (o *options) setOption(source, name string, values ...string) error {
	if len(values) == 0 && o.keepsOthersOut(name) {
		values = []string{""} // which is refused
	}

	for _, value := range values {
		err := setValue(o.flags.Lookup(name).Value, value)
		if o.keepsOthersOut(name) && strings.TrimSpace(value) == "" {
			err = errors.New("it is empty; leave it out altogether if there is to be none")
		}
		if err != nil {
			return fmt.Errorf("invalid value %q for %s: %w", value, source, err)
		}
		o.set[name] = append(o.set[name], value)
	}
	return nil
}

// setValue sets an option to a value of its type. Numbers are 0 or more, and durations above 0.
func setValue(option flag.Value, value string) error {
	err := option.Set(value)
	typed, ok := option.(flag.Getter)
	if !ok {
		return err
	}
	switch is := typed.Get().(type) {
	case bool:
		if err != nil {
			return errors.New("want true or false")
		}
	case int:
		if err != nil || is < 0 {
			return errors.New("want a number, 0 or more")
		}
	case time.Duration:
		if err != nil || is <= 0 {
			return errors.New("want a duration, such as 500ms, 20s or 10m")
		}
	}
	return err
}

func (o *options) unknownOption(name string) error {
	if name == "h" || name == "help" {
		return flag.ErrHelp
	}
	if err := serfHas("-" + name); err != nil {
		return err
	}

	var names []string
	o.flags.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	if near := nearest(name, names); near != "" {
		return fmt.Errorf("there is no option -%s; did you mean -%s?", name, near)
	}
	return fmt.Errorf("there is no option -%s", name)
}

// checkArgs compares the arguments with what the command takes.
func (o *options) checkArgs() error {
	takes := strings.Fields(o.command.args)
	if len(o.args) == 0 && len(takes) > 0 {
		return fmt.Errorf("%s is missing", o.command.args)
	}
	if len(o.args) <= len(takes) || strings.HasSuffix(o.command.args, "...") {
		return nil
	}
	extra := o.args[len(takes)]
	if _, err := parseKeys([]string{extra}); err == nil {
		extra = "(a key)" // which is never shown
	}
	return fmt.Errorf("unexpected argument %q", extra)
}

// nearest is the word of a list that was probably meant by word, which is not in it. It is "" where none is near.
func nearest(word string, list []string) (best string) {
	limit := min(2, len(word)/2)
	for _, candidate := range list {
		if n := difference(word, candidate); n <= limit {
			best = candidate
			limit = n - 1
		}
	}
	return best
}

// difference counts the letters between the common beginning and the common end of two words, in the longer one.
func difference(a, b string) int {
	for a != "" && b != "" && a[0] == b[0] {
		a = a[1:]
		b = b[1:]
	}
	for a != "" && b != "" && a[len(a)-1] == b[len(b)-1] {
		a = a[:len(a)-1]
		b = b[:len(b)-1]
	}
	return max(len(a), len(b))
}

// serfIgnored are the options of Serf that could only tune what needs no tuning here, with what happens instead.
// They are taken, so that no start command has to change for them.
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

const discoverAdvice = "name the seeds with -join: one DNS name will do"

// serfAdvice is what to use instead of the options and commands of Serf that would change what the user gets.
var serfAdvice = map[string]string{
	"-discover":          discoverAdvice,
	"-mdns-disable-ipv4": discoverAdvice,
	"-mdns-disable-ipv6": discoverAdvice,
	"-mdns-iface":        discoverAdvice,

	"-keyring-file": "give its keys with HAMLET_ENCRYPT, or as encrypt_key in a file: the first seals, any opens",
	"-tags-file":    "give tags with -tag or HAMLET_TAG, and change them with the tags command",
	"keys":          "change -encrypt to OLD,NEW, then NEW,OLD, then NEW, with a SIGHUP to every agent each time",
	"monitor":       "'watch' streams events, and the log is the agent's stderr",
	"reachability":  "every member is looked at all the time: see 'members' and 'info'",
	"rtt":           "there are no network coordinates: use ping",
}

// serfHas is the error of a word that only Serf has; nil: it is no such word.
func serfHas(word string) error {
	if advice, ok := serfAdvice[word]; ok {
		return usagef("", "hamlet has no %s: %s", word, advice)
	}
	return nil
}

// help is the page of that name.
func help(name string) string {
	_, page, _ := strings.Cut(helpPages, "# "+name+"\n\n")
	page, _, _ = strings.Cut(page, "\n# ")
	return strings.ReplaceAll(page, "{}", prog)
}

// plainText is a page of Markdown as a terminal shows it: headings in capitals, code indented.
func plainText(markdown string) string {
	var b strings.Builder
	inCode := false
	for line := range strings.Lines(markdown) {
		switch {
		case strings.HasPrefix(line, "```"):
			inCode = !inCode
		case inCode:
			b.WriteString("    " + line)
		case line[0] == '#':
			b.WriteString(strings.ToUpper(strings.TrimLeft(line, "# ")))
		default:
			b.WriteString(strings.ReplaceAll(line, "`", ""))
		}
	}
	return b.String()
}

// listOption defines an option whose values are all in set.
func (o *options) listOption(name string) {
	o.flags.Func(name, "", func(string) error { return nil })
}

// formatOption defines -format, and returns whether JSON is wanted.
func (o *options) formatOption() (asJSON *bool) {
	asJSON = new(bool)
	o.flags.Func("format", "", func(s string) error {
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

// ---- the commands that ask a running agent ----

// rpcOptions defines the options that say where the agent is.
func (o *options) rpcOptions() *client {
	agent := &client{}
	o.flags.StringVar(&agent.addr, "rpc-addr", rpcVariable("ADDR", defaultRPC), "")
	o.flags.StringVar(&agent.token, "rpc-auth", rpcVariable("AUTH", ""), "")
	return agent
}

// rpcVariable is SERF_RPC_name, which handlers have, or what the agent of the same container was configured with.
func rpcVariable(name, byDefault string) string {
	for _, prefix := range []string{"SERF_RPC_", "HAMLET_RPC_"} {
		if value := os.Getenv(prefix + name); value != "" {
			return value
		}
	}
	return byDefault
}

func infoCommand(o *options) error {
	agent := o.rpcOptions()
	asJSON := o.formatOption()
	if err := o.parse(); err != nil {
		return err
	}

	var facts []string
	err := agent.call(rpcRequest{Op: "info"}, rpcTimeout, func(a rpcResponse, _ []update) error {
		facts = append(facts, splitNUL(a.Text)...)
		return nil
	})
	if err != nil {
		return err
	}
	facts = facts[:len(facts)/3*3] // an agent of another version may say anything
	if *asJSON {
		return output(infoJSON(facts))
	}
	return output(infoText(facts))
}

// infoText shows facts: group, key, value; and so on.
func infoText(facts []string) string {
	text := ""
	group := ""
	for fact := range slices.Chunk(facts, 3) {
		if fact[0] != group {
			group = fact[0]
			text += printable(group, "") + ":\n"
		}
		if fact[1] != "" {
			text += fmt.Sprintf("\t%s = %s\n", printable(fact[1], ""), printable(fact[2], ""))
		}
	}
	return text
}

func infoJSON(facts []string) string {
	groups := make(map[string]map[string]string)
	for fact := range slices.Chunk(facts, 3) {
		if groups[fact[0]] == nil {
			groups[fact[0]] = make(map[string]string)
		}
		if fact[1] != "" {
			groups[fact[0]][fact[1]] = fact[2]
		}
	}
	return toJSON(groups)
}

func tagsCommand(o *options) error {
	agent := o.rpcOptions()
	set := make(map[string]string)
	var remove []string
	o.flags.Func("set", "", setTag(set, ""))
	o.flags.Func("delete", "", func(key string) error {
		if key == "" || strings.Contains(key, "=") {
			return errors.New("want KEY, such as state")
		}
		remove = append(remove, key)
		return nil
	})
	if err := o.parse(); err != nil {
		return err
	}

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

func eventCommand(o *options) error {
	agent := o.rpcOptions()
	coalesce := o.flags.Bool("coalesce", true, "")
	if err := o.parse(); err != nil {
		return err
	}

	payload := strings.Join(o.args[1:], "") // one word, or none
	req := rpcRequest{Op: "event", Name: o.args[0], Payload: []byte(payload), Coalesce: *coalesce}
	done := fmt.Sprintf("Event '%s' dispatched! Coalescing enabled: %v\n", printable(req.Name, ""), *coalesce)
	return agent.tell(req, rpcTimeout, done)
}

func joinCommand(o *options) error {
	agent := o.rpcOptions()
	replay := o.flags.Bool("replay", false, "")
	if err := o.parse(); err != nil {
		return err
	}

	if err := checkAddrs(o.args); err != nil {
		return usagef("", "join: %v", err)
	}
	req := rpcRequest{Op: "join", Args: strings.Join(o.args, "\x00"), Replay: *replay}
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

func leaveCommand(o *options) error {
	agent := o.rpcOptions()
	if err := o.parse(); err != nil {
		return err
	}
	return agent.tell(rpcRequest{Op: "leave"}, slowTimeout, "Graceful leave complete\n")
}

func forceLeaveCommand(o *options) error {
	agent := o.rpcOptions()
	prune := o.flags.Bool("prune", false, "")
	if err := o.parse(); err != nil {
		return err
	}
	return agent.tell(rpcRequest{Op: "force-leave", Name: o.args[0], Prune: *prune}, rpcTimeout, "")
}

func keygenCommand(o *options) error {
	if err := o.parse(); err != nil {
		return err
	}
	key := make([]byte, keySize)
	rand.Read(key) // never fails
	return output(base64.StdEncoding.EncodeToString(key) + "\n")
}

func versionCommand(o *options) error {
	if err := o.parse(); err != nil {
		return err
	}
	return output(fmt.Sprintf("hamlet %s (%sprotocol %d, %s, %s/%s)\n", version, commit(), protocolVersion,
		runtime.Version(), runtime.GOOS, runtime.GOARCH))
}

// commit is what the program was built from, where the build knows it.
func commit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var revision, changes string
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			changes = " with changes"
		}
	}
	if revision == "" {
		return ""
	}
	return fmt.Sprintf("commit %.10s%s, ", revision, changes)
}

// ---- members ----

func membersCommand(o *options) error {
	agent := o.rpcOptions()
	asJSON := o.formatOption()
	filter := make(memberFilter)
	o.flags.Func("status", "", filter.set("status="))
	o.flags.Func("name", "", filter.set("name="))
	o.flags.Func("tag", "", filter.set("tag "))
	o.flags.Func("role", "", filter.set("tag role="))
	detailed := o.flags.Bool("detailed", false, "")
	wait := o.flags.Int("wait", 0, "")
	timeout := o.flags.Duration("timeout", 0, "")
	if err := o.parse(); err != nil {
		return err
	}

	if *timeout > 0 && *wait == 0 {
		return usagef("for example: -wait 3 -timeout 20s", "-timeout needs -wait N")
	}
	status := filter["status"]
	if *wait > 0 && status != nil && !status.MatchString(statusAlive.String()) {
		return usagef("", "-wait counts members that are alive, and -status leaves them out")
	}
	members, err := agent.waitForMembers(filter, *wait, *timeout)
	if err != nil {
		return err
	}
	if *asJSON {
		return output(membersJSON(members, *detailed))
	}
	return output(membersText(members, *detailed))
}

// ---- watch ----

func watchCommand(o *options) error {
	agent := o.rpcOptions()
	asJSON := o.formatOption()
	events := o.flags.String("event", "*", "")
	count := o.flags.Int("n", 0, "")
	timeout := o.flags.Duration("timeout", 0, "")
	if err := o.parse(); err != nil {
		return err
	}
	kinds := strings.Split(*events, ",")
	if err := checkWatch(kinds, *count, *timeout); err != nil {
		return err
	}

	if *timeout > 0 {
		time.AfterFunc(*timeout, func() { exit(failf("", "fewer than %d events within %v", *count, *timeout)) })
	}
	seen := 0
	err := agent.call(rpcRequest{Op: "watch"}, rpcTimeout, func(a rpcResponse, us []update) error {
		text := droppedLine(a.Dropped, *asJSON)
		for _, u := range us {
			if !matches(kinds, a.Kind, u.Name) {
				continue
			}
			text += watchLine(time.Unix(0, a.At), Event{kind: a.Kind, update: u, changed: a.Text}, *asJSON)
			if a.Kind != 0 { // a member that was there at the start is no event
				seen++
			}
		}
		if err := output(text); err != nil {
			return err
		}
		if *count > 0 && seen >= *count {
			return io.EOF
		}
		return nil
	})
	if err == nil && seen < *count {
		return failf("", "the agent has ended: %d of %d events", seen, *count)
	}
	return err
}

// checkWatch says what is wrong with the options of watch.
func checkWatch(kinds []string, count int, timeout time.Duration) error {
	atStart := eventNames[0]
	onlyEvents := slices.DeleteFunc(slices.Clone(kinds), func(ev string) bool { return ev == atStart })
	if err := checkEvents(onlyEvents); err != nil {
		return usagef(fmt.Sprintf("'%s help watch' shows some", prog), "-event: %v", err)
	}
	if timeout > 0 && count == 0 {
		return usagef("for example: -n 1 -timeout 60s", "-timeout needs -n N")
	}
	if count > 0 && len(onlyEvents) == 0 {
		return usagef("", "-n counts events, and %q is none: it stands for each member at the start", atStart)
	}
	return nil
}

// ---- query ----

func queryCommand(o *options) error {
	agent := o.rpcOptions()
	asJSON := o.formatOption()
	filter := make(memberFilter)
	var nodes []string
	o.flags.Func("node", "", func(name string) error {
		nodes = append(nodes, name)
		return validName(name) // an empty one would ask all
	})
	o.flags.Func("tag", "", filter.set("tag "))
	timeout := o.flags.Duration("timeout", 15*time.Second, "")
	noAck := o.flags.Bool("no-ack", false, "")
	if err := o.parse(); err != nil {
		return err
	}
	if *timeout > maxQueryTimeout {
		return usagef("", "-timeout is at most %v, not %v", maxQueryTimeout, *timeout)
	}

	result := newQueryResult(*noAck)
	show := func(text string) error {
		if *asJSON {
			return nil // programs get all at the end
		}
		return output(printable(text, "\n\t"))
	}
	payload := strings.Join(o.args[1:], "") // one word, or none
	req := rpcRequest{Op: "query", Name: o.args[0], Payload: []byte(payload), Timeout: *timeout}
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
		return failf("'members' shows which are alive; -timeout sets how long to wait", "no answer from %s",
			strings.Join(slices.Sorted(maps.Keys(result.waiting)), ", "))
	}
	return nil
}

// ---- the agent ----

// agent is what the agent's options say, some as the user wrote them, and, once it runs, its parts.
type agent struct {
	options          *options
	gossip           gossipConfig
	handlers         handlerConfig
	bind             string
	advertise        string
	rpcAddr          string
	rpcAuth          string
	logLevel         string
	tags             map[string]string
	leaveOnTerminate bool

	lastRead *agent // the options as they were read last
	g        *gossip
	hs       *handlers
	logs     *logWriter
	ended    chan struct{} // closed when all has ended
}

func agentCommand(o *options) error {
	if os.Getpid() == 1 {
		os.Exit(runAsInit())
	}
	a := newAgent(o)
	if err := a.read(); err != nil {
		return err
	}
	return a.run()
}

// newAgent defines the agent's options.
func newAgent(o *options) *agent {
	a := &agent{options: o, tags: make(map[string]string)}
	g := &a.gossip
	fs := o.flags
	fs.StringVar(&g.member.Name, "node", "", "")
	fs.Func("role", "", setTag(a.tags, "role="))
	fs.Func("tag", "", setTag(a.tags, ""))
	fs.StringVar(&a.bind, "bind", "", "")
	fs.StringVar(&a.advertise, "advertise", "", "")
	fs.StringVar(&g.iface, "iface", "", "")
	fs.StringVar(&a.rpcAddr, "rpc-addr", defaultRPC, "")
	fs.StringVar(&a.rpcAuth, "rpc-auth", "", "")
	fs.Func("join", "", a.seed)
	fs.Func("retry-join", "", a.seed)
	fs.IntVar(&g.retryMax, "retry-max", 0, "")
	fs.BoolVar(&g.replay, "replay", false, "")
	fs.StringVar(&g.cluster, "cluster", "", "")
	o.listOption("encrypt")
	fs.DurationVar(&g.reapAfter, "reap-after", 24*time.Hour, "")
	fs.BoolVar(&a.leaveOnTerminate, "leave-on-terminate", false, "")
	o.listOption("event-handler")
	fs.DurationVar(&a.handlers.timeout, "handler-timeout", 10*time.Minute, "")
	fs.StringVar(&a.logLevel, "log-level", "info", "")
	o.listOption("config-file")
	o.listOption("config-dir")
	a.handlers.grace = handlerGrace
	return a
}

// read sets the options: a flag wins over the environment, and that over files. What is a list adds up.
func (a *agent) read() error {
	if err := a.options.parse(); err != nil {
		return err
	}
	if err := a.readFiles(); err != nil {
		return err
	}

	var err error
	a.handlers.specs = a.options.set["event-handler"]
	a.gossip.member.Tags, err = makeTags(a.tags)
	if err != nil {
		return usagef("", "-tag: %v", err)
	}
	a.gossip.keys, err = parseKeys(a.options.set["encrypt"])
	if err != nil {
		return usagef(fmt.Sprintf("'%s keygen' makes a key", prog), "-encrypt: %v", err)
	}
	if logLevelOf(a.logLevel) < 0 {
		names := strings.ToLower(strings.Join(levelNames, ", "))
		return usagef("", "-log-level: %q is none of %s", a.logLevel, names)
	}
	return nil
}

func (a *agent) seed(s string) error {
	seeds := strings.Split(s, ",")
	a.gossip.seeds = append(a.gossip.seeds, seeds...)
	return checkAddrs(seeds)
}

// setFromEnvironment sets the options that were not given from their variables.
func (o *options) setFromEnvironment() error {
	var unknown []string
	for _, kv := range o.environ {
		variable, text, _ := strings.Cut(kv, "=")
		name, ours := strings.CutPrefix(variable, "HAMLET_")
		name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
		if !ours || o.set[name] != nil {
			continue
		}
		if o.flags.Lookup(name) == nil {
			if !isServiceLink(kv) {
				unknown = append(unknown, variable)
			}
			continue
		}

		// Templates set all variables, also those that have no value. But an empty secret is one that is missing.
		if text == "" && !o.keepsOthersOut(name) {
			continue
		}
		if err := o.setFromVariable(variable, text, name); err != nil {
			return err
		}
	}
	if len(unknown) > 0 {
		o.notes = append(o.notes, fmt.Sprintf("there is no option %s: ignored", strings.Join(unknown, ", ")))
	}
	return nil
}

// isServiceLink reports whether a variable was set by Kubernetes or by a Docker link, for a service or a container
// that is called hamlet or hamlet-something, and not by the user.
func isServiceLink(kv string) bool {
	// A user may set HAMLET_PORT and HAMLET_NAME by mistake, but not to tcp://10.0.0.1:7946 and /web/hamlet.
	is, _ := regexp.MatchString(`^HAMLET(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|ENV_\w+|`+
		`PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END|PORT_START|PORT_END))?)=|`+
		`^HAMLET_(\w+_)?PORT=.*://|^HAMLET_(\w+_)?NAME=/`, kv)
	return is
}

// setFromVariable sets an option to the text of a variable, or to each item of it where that is a list.
func (o *options) setFromVariable(variable, text, name string) error {
	lists := []string{"config-dir", "config-file", "encrypt", "event-handler", "join", "retry-join", "tag"}
	if !slices.Contains(lists, name) {
		return o.setOption(variable, name, text)
	}
	items := splitList(text)
	err := o.setOption(variable, name, items...)
	if len(items) < 2 || strings.Contains(text, "\n") || name == "encrypt" { // no error may show a key
		return err
	}

	// Commas that belong to one item have split it: what is left of it is no item, or breaks off inside quotes.
	for _, item := range items {
		isBroken := strings.Count(item, `"`)%2 > 0 || strings.Count(item, "'")%2 > 0
		if err == nil && isBroken {
			err = fmt.Errorf("invalid value %q for %s: it breaks off inside quotes", item, variable)
		}
	}
	if err != nil {
		err = fmt.Errorf("%w; it is split at its commas: end it with a newline to have it split at newlines only", err)
	}
	return err
}

// splitList takes a list apart at its commas, or at its newlines if there are any. The events in
// member-join,user:x=script stay with their script.
func splitList(text string) (items []string) {
	sep := ","
	if strings.Contains(text, "\n") {
		sep = "\n"
	}
	for item := range strings.SplitSeq(text, sep) {
		item = strings.TrimSpace(item)
		last := len(items) - 1
		switch {
		case item == "":
		case last >= 0 && isEventList(items[last]):
			items[last] += "," + item
		default:
			items = append(items, item)
		}
	}
	return items
}

// isEventList reports whether text names events, and no script for them.
func isEventList(text string) bool {
	return !strings.Contains(text, "=") && checkEvents(strings.Split(text, ",")) == nil
}

// serfKeys are the keys of Serf's configuration files whose option has another name than the key with '-' for '_'.
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

// readFiles sets the options that files give. What flags or the environment have set stays; tags, seeds and handlers
// are added to those.
func (a *agent) readFiles() error {
	given := maps.Clone(a.options.set)
	for _, list := range []string{"tag", "role", "join", "retry-join", "event-handler"} {
		delete(given, list)
	}

	files := slices.Clone(given["config-file"])
	for _, folder := range given["config-dir"] {
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
		if err := a.setFromJSON(given, file, text); err != nil {
			return err
		}
	}
	return nil
}

// setFromJSON sets options from one file. What an earlier file has set and is no list is set anew.
func (a *agent) setFromJSON(given map[string][]string, file string, text []byte) error {
	object, err := decodeObject(text)
	if err != nil {
		return failf("want an object, such as {\"node_name\": \"web1\"}", "%s: %v", file, err)
	}

	before := maps.Clone(a.tags) // which stay
	clear(a.tags)
	for _, key := range slices.Sorted(maps.Keys(object)) {
		name, ok := serfKeys[key]
		if !ok {
			name = strings.ReplaceAll(key, "_", "-")
		}
		if name == "keyring-file" { // without the keys in it, the agent would send in clear
			return usagef(serfAdvice["-"+name], "%s: hamlet has no %q", file, key)
		}
		if a.options.flags.Lookup(name) == nil {
			a.options.notes = append(a.options.notes, unknownKey(file, key, name))
			continue
		}
		if given[name] != nil {
			continue
		}

		if err := a.options.setOption("-"+name, name, optionTexts(object[key])...); err != nil {
			return failf("", "%s: %s: %v", file, key, err)
		}
	}
	maps.Copy(a.tags, before)
	return nil
}

// decodeObject decodes a JSON object. The error names the line.
func decodeObject(text []byte) (object map[string]any, err error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber() // which keeps the text of a number
	err = decoder.Decode(&object)
	if err == nil {
		return object, nil
	}

	at := decoder.InputOffset()
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		at = min(syntax.Offset, int64(len(text)))
	}
	return nil, fmt.Errorf("line %d: this is not JSON: %w", 1+bytes.Count(text[:at], []byte("\n")), err)
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

// unknownKey is what the log says of a key in a file that is no option.
func unknownKey(file, key, option string) string {
	if instead, ok := serfIgnored[option]; ok {
		return fmt.Sprintf("%s: %q has no effect: %s", file, key, instead)
	}
	if advice, ok := serfAdvice["-"+option]; ok {
		return fmt.Sprintf("%s: hamlet has no %q: %s", file, key, advice)
	}
	return fmt.Sprintf("%s: there is no option %q: ignored", file, key)
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
	cfg.bind, err = a.bindAddress()
	if err != nil {
		return "", err
	}
	cfg.moves = cfg.bind.Addr().IsUnspecified() && a.advertise == ""

	ctx, cancel := context.WithTimeout(context.Background(), startPatience)
	defer cancel()
	cfg.member.Addr, why, err = a.advertised(ctx)
	f, _ := errors.AsType[*failure](err)
	if f == nil || !f.retriable {
		return why, err
	}
	// The address may become known later. Until then a stopgap is taken.
	cfg.awaits = f.msg
	_, port, _ := hostPort(a.advertise, fmt.Sprint(cfg.bind.Port()))
	cfg.member.Addr = netip.MustParseAddrPort(net.JoinHostPort("127.0.0.1", port))
	return "it is not known yet", nil
}

// awaitAddress waits until the address to advertise is known, and has the agent join then.
func (a *agent) awaitAddress() {
	a.gossip.log.printf(levelWarn, "%s: this node joins as soon as it has an address to advertise", a.gossip.awaits)
	for {
		addr, _, err := a.advertised(a.g.acceptor.ctx)
		if err == nil {
			a.g.addressKnown(addr.Addr())
			return
		}
		select {
		case <-time.After(addressPoll):
		case <-a.g.acceptor.ctx.Done():
			return
		}
	}
}

// parseKeys decodes lists of keys. Its errors never show a key.
func parseKeys(lists []string) (keys [][]byte, err error) {
	if lists == nil {
		return nil, nil
	}
	texts := strings.Split(strings.Join(lists, ","), ",")
	for i, text := range texts {
		if text == "none" {
			keys = append(keys, noKey)
			continue
		}
		key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("key %d of %d is not base64", i+1, len(texts))
		}
		if len(key) != 16 && len(key) != 24 && len(key) != 32 {
			return nil, fmt.Errorf("key %d of %d has %d bytes, a key has 32, 24 or 16", i+1, len(texts), len(key))
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// run runs the agent until it is told to stop.
func (a *agent) run() error {
	a.logs = newLogWriter(logLevelOf(a.logLevel))
	a.gossip.member.Version = version
	a.gossip.log = a.logs.log
	a.handlers.log = a.logs.log
	why, err := a.check()
	if err != nil {
		return err
	}

	// Until here a signal ends the process, however long a resolver takes.
	ln, err := a.listenRPC()
	if err != nil {
		return err
	}
	signals := prepareProcess()
	a.hs, err = newHandlers(a.handlers)
	if err != nil {
		return usagef(fmt.Sprintf("'%s help agent' explains -event-handler", prog), "%v", err)
	}
	a.gossip.otherPort = uint16(ln.Addr().(*net.TCPAddr).Port)
	a.gossip.events = a.hs.deliver
	a.g, err = newGossip(a.gossip)
	if err != nil {
		return startFailure("gossip", "-bind", a.gossip.bind.String(), err)
	}
	a.hs.cfg.env = func() []string {
		self, alone := a.g.self()
		return handlerEnv(self, alone, ln.Addr().String(), a.rpcAuth)
	}

	go a.g.loop()
	a.banner(why, ln.Addr())
	if a.gossip.awaits != "" {
		go a.awaitAddress()
	}
	a.logNotes(a.options.notes, nil)
	a.lastRead = a
	a.logs.pumping.Go(a.logs.pump) // only now, so that the banner comes before the log
	defer a.logs.flush()
	rpc := serveRPC(ln, a.g, a.rpcAuth, a.info)
	a.ended = make(chan struct{})
	go func() {
		<-a.g.done
		rpc.close()
		a.hs.close(a.g.last...)
		close(a.ended)
	}()
	return a.wait(signals)
}

// logNotes warns of what was not understood, and was not told before.
func (a *agent) logNotes(notes, told []string) {
	for _, note := range notes {
		if !slices.Contains(told, note) {
			a.gossip.log.printf(levelWarn, "%s", note)
		}
	}
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
func (a *agent) reload() error {
	read := newAgent(newOptions(a.options.command, a.options.typed, a.options.environ))
	if err := read.read(); err != nil {
		return err
	}
	if err := a.hs.reload(read.handlers); err != nil {
		return err
	}

	// What was read is valid, so it takes effect.
	a.logNotes(read.options.notes, a.lastRead.options.notes)
	if fixed := a.fixedChanges(read); len(fixed) > 0 {
		a.gossip.log.printf(levelWarn, "only a restart changes -%s", strings.Join(fixed, ", -"))
	}
	a.logs.level.Store(int32(logLevelOf(read.logLevel)))
	a.g.setKeys(read.gossip.keys)
	set, remove := tagChanges(a.lastRead.tags, read.tags)
	a.lastRead = read
	err := a.g.run(func(n *node) error { return n.identity.setTags(n, set, remove) })
	if err == nil {
		a.gossip.log.printf(levelInfo, "hangup: read the options again")
	}
	return err
}

// tagChanges is what leads from one set of tags to another. What the tags command has changed meanwhile stays.
func tagChanges(was, is map[string]string) (set map[string]string, remove []string) {
	set = maps.Clone(is)
	for key, old := range was {
		value, ok := is[key]
		if !ok {
			remove = append(remove, key)
		}
		if value == old {
			delete(set, key)
		}
	}
	return set, remove
}

// fixedChanges names the options that are set to something else in b, and cannot change while the agent runs.
func (a *agent) fixedChanges(b *agent) (names []string) {
	fixed := "advertise bind cluster iface join leave-on-terminate node reap-after replay " +
		"retry-join retry-max rpc-addr rpc-auth"
	for name := range strings.FieldsSeq(fixed) {
		if !slices.Equal(a.options.set[name], b.options.set[name]) {
			names = append(names, name)
		}
	}
	return names
}

// prepareProcess fits the process to an agent, and returns the signals that it gets.
func prepareProcess() <-chan os.Signal {
	os.Unsetenv("HAMLET_ENCRYPT") // handlers have no use for it
	// A panic ends with SIGABRT, and never with status 2, after which systemd would not start the agent again.
	debug.SetTraceback("crash")
	runtime.GOMAXPROCS(1) // an agent mostly sleeps: a second processor costs a third more to wake up
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
	hint := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "is an agent running there already? choose another address with " + option
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = "this machine has no such address; choose another with " + option
	case errors.Is(err, syscall.EACCES):
		hint = "ports below 1024 need root; choose another with " + option
	}
	return failf(hint, "cannot listen on %s for %s: %v", addr, what, reason(err))
}

// banner tells how the agent can be reached, and warns of settings that are hardly meant.
func (a *agent) banner(why string, rpc net.Addr) {
	self, _ := a.g.self()
	fmt.Printf(`==> Starting hamlet agent...
==> Starting hamlet agent RPC...
==> hamlet agent running!
    Node name: '%s'
    Bind addr: '%s'
    Advertise: '%s' (%s)
     RPC addr: '%s'
    Encrypted: %v
`, self.Name, a.g.udp.LocalAddr(), self.Addr, why, rpc, a.gossip.sealsWithKey())

	if a.gossip.awaits == "" {
		a.warnOfAddress(self.Addr, why)
	}
	if !rpc.(*net.TCPAddr).IP.IsLoopback() && a.rpcAuth == "" {
		a.gossip.log.printf(levelWarn, "the RPC listens on %s without a token: "+
			"anyone who can reach it controls this agent (-rpc-auth sets one)", rpc)
	}
}

// warnOfAddress warns of an advertised address that no other machine can reach, or any.
func (a *agent) warnOfAddress(addr netip.AddrPort, why string) {
	bind := a.gossip.bind
	ip := addr.Addr()
	if ip.IsLoopback() && a.gossip.moves { // the user did not choose it
		remedy := "-advertise sets one"
		ips, _ := addressesOf("")
		if bind.Addr().Is4() && !bestAddress(ips, netip.IPv6Unspecified()).Is4() {
			remedy = fmt.Sprintf("-bind [::]:%d takes IPv6 as well", bind.Port())
		}
		a.gossip.log.printf(levelWarn, "advertising %s, which other machines cannot reach: %s (%s)", addr, why, remedy)
	}
	if !a.gossip.sealsWithKey() && !isPrivate(ip) {
		a.gossip.log.printf(levelWarn, "%s is a public address, and there is no key: "+
			"anyone who can reach it can join and lie (-encrypt sets one)", addr)
	}
}

// info is what the agent knows of itself: group, key, value; and so on.
func (a *agent) info() (facts []string) {
	add := func(group, key string, value any) { facts = append(facts, group, key, fmt.Sprint(value)) }

	self, _ := a.g.self()
	add("agent", "name", self.Name)
	add("agent", "addr", self.Addr)
	add("agent", "version", version)
	add("agent", "protocol", protocolVersion)
	add("agent", "uptime", time.Since(a.g.start).Round(time.Second))

	add("event_handlers", "", "")
	facts = append(facts, a.hs.info()...)

	add("runtime", "arch", runtime.GOARCH)
	add("runtime", "cpu_count", runtime.NumCPU())
	add("runtime", "goroutines", runtime.NumGoroutine())
	add("runtime", "max_procs", runtime.GOMAXPROCS(0))
	add("runtime", "os", runtime.GOOS)
	add("runtime", "version", runtime.Version())

	sealer := a.g.acceptor.sealer.Load()
	add("serf", "encrypted", sealer.sealsWithKey())
	add("serf", "keys", len(sealer.keys))
	for i, key := range sealer.keys {
		add("serf", fmt.Sprintf("key_%d", i+1), fingerprint(key))
	}
	a.g.run(func(n *node) error {
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
func (a *agent) wait(signals <-chan os.Signal) error {
	var told time.Time // to stop
	for {
		select {
		case <-a.ended:
			if errors.Is(a.g.err, errNameTaken) {
				return failf("choose another name with -node", "%v", a.g.err)
			}
			return a.g.err
		case s := <-signals:
			switch {
			case s == syscall.SIGHUP:
				if err := a.reload(); err != nil {
					a.gossip.log.printf(levelErr, "nothing is changed, since the options cannot be read again: %v", err)
				}
			case told.IsZero():
				told = time.Now()
				a.stop(s)
			case time.Since(told) > sameSignal:
				return failf("", "%v while stopping: ended at once", s)
			}
		}
	}
}

// stop begins to end the agent, in the way that the signal asks for.
func (a *agent) stop(s os.Signal) {
	if s == os.Interrupt || s == syscall.SIGTERM && a.leaveOnTerminate {
		a.gossip.log.printf(levelInfo, "%v: leaving the cluster, a second signal ends at once", s)
		go a.g.leave()
		return
	}
	a.gossip.log.printf(levelInfo, "%v: ending without leaving", s)
	go a.g.close() // peers notice at once; handlers get their grace
}

// runAsInit is the first process of a container: it runs this same program as its child and returns that child's
// exit status. It forwards the signals that stop an agent and waits for every process that lost its parent. It
// starts nothing else, because wait4(-1) would take os/exec's children away from it.
func runAsInit() (exit int) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	exe, err := os.Executable()
	if err != nil {
		exe = os.Args[0]
	}
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
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err != nil && err != syscall.EINTR {
			return 1
		}
		if pid != child {
			continue
		}
		if status.Exited() {
			return status.ExitStatus()
		}
		if status.Signaled() {
			return 128 + int(status.Signal())
		}
	}
}

// ---- addresses ----

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

	ip, notIP := netip.ParseAddr(host)
	isName := strings.ContainsFunc(host, unicode.IsLetter) && !strings.Contains(host, ":")
	if ip.IsMulticast() || notIP != nil && !isName {
		return bind, wrong
	}
	fits := func(ip netip.Addr) bool { return notIP == nil || ip.IsLoopback() || isOwnAddress(ip) }
	bind, err = lookUpOne(context.Background(), host, port, fits)
	if err != nil {
		err = failf("-bind takes HOST:PORT; HOST must be, or resolve to, an address of this machine",
			"-bind: cannot listen on %q: %v", a.bind, err)
	}
	return bind, err
}

// needsIPv6 reports whether an agent that may listen anywhere has to listen on IPv6: it is told an IPv6 address, or
// has no other.
func (a *agent) needsIPv6() bool {
	for _, s := range append(slices.Clone(a.gossip.seeds), a.advertise) {
		host, _, _ := hostPort(s, defaultPort)
		if ip, err := netip.ParseAddr(host); err == nil && ip.Unmap().Is6() {
			return true
		}
	}
	all, _ := addressesOf("")
	own, _ := addressesOf(a.gossip.iface)
	return !bestAddress(own, netip.IPv4Unspecified()).IsValid() && slices.ContainsFunc(all, netip.Addr.Is6)
}

// advertised returns the address that others are told, and the reason. It is never a wildcard, and loopback only if
// that is asked for or if there is nothing else. An error whose failure is retriable may come right by itself.
func (a *agent) advertised(ctx context.Context) (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	switch {
	case a.advertise != "" && a.gossip.iface != "":
		return addr, "", usagef("give one of them", "-advertise %s and -iface %s", a.advertise, a.gossip.iface)
	case a.advertise != "":
		return a.namedAddress(ctx)
	case a.gossip.iface != "":
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
	host, port, err := hostPort(a.advertise, fmt.Sprint(bind.Port()))
	if err != nil {
		return addr, "", usagef("-advertise takes HOST or HOST:PORT", "-advertise: %v", err)
	}
	addr, err = lookUpOne(ctx, host, port, func(ip netip.Addr) bool {
		return !ip.IsUnspecified() && !ip.IsMulticast() && sameFamily(ip, bind.Addr())
	})
	if err == nil {
		return addr, "set with -advertise", nil
	}

	if _, notIP := netip.ParseAddr(host); notIP == nil {
		return addr, "", usagef("-advertise takes HOST or HOST:PORT; -bind [::]:7946 takes IPv4 and IPv6",
			"-advertise %q: no address at which others could reach %s", a.advertise, bind)
	}
	return addr, "", notYetf("-advertise %q: %v", a.advertise, err)
}

// interfaceAddress is the address of -iface.
func (a *agent) interfaceAddress() (addr netip.AddrPort, why string, err error) {
	bind := a.gossip.bind
	iface := a.gossip.iface
	ips, err := addressesOf(iface)
	if err != nil {
		return addr, "", failf("-iface takes the name of an interface", "-iface: there is no interface %q", iface)
	}
	if slices.Contains(ips, bind.Addr()) {
		return bind, "the bound address, of " + iface, nil
	}
	if !bind.Addr().IsUnspecified() {
		return addr, "", failf("leave one of them out, or give an address of the interface with -bind",
			"-iface %s and -bind %s: the interface does not have that address", iface, bind)
	}

	ip := bestAddress(ips, bind.Addr())
	if !ip.IsValid() {
		return addr, "", notYetf("-iface: %s has no address yet at which others could reach %s", iface, bind)
	}
	return netip.AddrPortFrom(ip, bind.Port()), "address of " + iface, nil
}

// routeAddress asks the kernel which address of this machine leads to the seeds that are given as addresses, then
// to the rest of the world. Names are not looked up here: the first seed that answers settles it.
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

	// There is no route. Machines on some network of this one may be peers all the same.
	ifcs, _ := net.Interfaces()
	for _, fits := range []func(ip, bind netip.Addr) bool{usable, isReachable} {
		for _, ifc := range ifcs {
			ips, _ := addressesOf(ifc.Name)
			for _, ip := range ips {
				if ifc.Flags&net.FlagUp != 0 && fits(ip, bind) {
					return ip, "address of " + ifc.Name
				}
			}
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}), "no other address was found" // which [::] takes as well
}

// isPrivate reports whether ip is one that the Internet does not route: also those of RFC 6598, which carriers,
// clouds and VPNs use as private ones.
func isPrivate(ip netip.Addr) bool {
	shared := netip.MustParsePrefix("100.64.0.0/10")
	return ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || shared.Contains(ip)
}

// ---- the log ----

// logLevelOf is the level of a name in any case; -1: there is none.
func logLevelOf(name string) logLevel {
	return logLevel(slices.Index(levelNames, strings.ToUpper(name)))
}

// logWriter writes log lines of a level and above to stderr. It never blocks: a terminal that was halted must not
// halt the agent. Until pump runs, lines wait.
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

// formatLine is a line as it is written. The journal has a date of its own, and takes a priority in front
// (sd-daemon(3)).
func formatLine(l logLine, toJournal bool) string {
	// What spans lines, as the output of a script, is indented: none of it can pass for a line of the log.
	text := strings.ReplaceAll(printable(strings.TrimSuffix(l.String(), "\n"), "\n\t"), "\n", "\n\t") + "\n"
	if !toJournal {
		return time.Now().Format(logTime) + " " + text
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
			lost := logLine{levelWarn, fmt.Sprintf("%d log lines were lost here: they were not read in time", n)}
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
