// serf_test.go: what a Serf user types works as it did, or is told in one line
// what to do instead. Serf itself is not run: what it prints is held here as text,
// as Serf 0.10.2 printed it.

package test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// serfForms are command lines, asked in this order of the agent s1, which has the
// tag role=web and answers load with 0.5. With s2, which answers 0.7, it is joined.
// In what Serf prints {s1} and {s2} stand for addresses, and ? for any value; what
// hamlet has not (protocol versions, coordinates, queues) is left out of it.
var serfForms = []struct{ line, prints string }{
	{"join {s2}", "Successfully joined cluster by contacting 1 nodes.\n"},
	{"members", "s1  {s1}  alive  role=web\ns2  {s2}  alive\n"},
	{"members -format json", `{"members": [
		{"name": "s1", "addr": "{s1}", "port": 0, "tags": {"role": "web"}, "status": "alive"},
		{"name": "s2", "addr": "{s2}", "port": 0, "tags": {}, "status": "alive"}]}`},
	{"event deploy 3f2c1aa", "Event 'deploy' dispatched! Coalescing enabled: true\n"},
	{"event -coalesce=false deploy 3f2c1aa", "Event 'deploy' dispatched! Coalescing enabled: false\n"},
	{"tags -set zone=a -set b=c", "Successfully updated agent tags\n"},
	{"tags -delete b", "Successfully updated agent tags\n"},
	{"members -name s1", "s1  {s1}  alive  role=web,zone=a\n"},
	{"query load", `Query 'load' dispatched
Ack from 's1'
Response from 's1': 0.5
Ack from 's2'
Response from 's2': 0.7
Total Acks: 2
Total Responses: 2
`},
	{"query -format json load", `{"Acks": ["s1", "s2"], "Responses": {"s1": "0.5\n", "s2": "0.7\n"}}`},
	{"query -no-ack load",
		"Query 'load' dispatched\nResponse from 's1': 0.5\nResponse from 's2': 0.7\nTotal Responses: 2\n"},
	{"query -node s2 load",
		"Query 'load' dispatched\nAck from 's2'\nResponse from 's2': 0.7\nTotal Acks: 1\nTotal Responses: 1\n"},
	{"query nohandler",
		"Query 'nohandler' dispatched\nAck from 's1'\nAck from 's2'\nTotal Acks: 2\nTotal Responses: 0\n"},
	{"info", `agent:
	name = s1
event_handlers:
runtime:
	arch = ?
	cpu_count = ?
	goroutines = ?
	max_procs = ?
	os = ?
	version = ?
serf:
	encrypted = false
	event_time = ?
	failed = 0
	left = 0
	members = 2
tags:
	role = web
	zone = a
`},
	{"info -format json", `{"agent": {"name": "s1"}, "event_handlers": {}, 
		"runtime": {"arch": "?", "cpu_count": "?", "goroutines": "?", "max_procs": "?", "os": "?", "version": "?"},
		"serf": {"encrypted": "false", "event_time": "?", "failed": "0", "left": "0", "members": "2"}, "tags": {"role": "web", "zone": "a"}}`},
	{"force-leave s2", ""}, // which has been killed
	{"members", "s1  {s1}  alive  role=web,zone=a\ns2  {s2}  left\n"},
	{"leave", "Graceful leave complete\n"},
}

func TestSerfFormsOfOutputAreKept(t *testing.T) {
	t.Parallel()
	s1 := startAgent(t, "-node", "s1", "-tag", "role=web", "-event-handler", "query:load=echo 0.5")
	s2 := startAgent(t, "-node", "s2", "-event-handler", "query:load=echo 0.7")
	fill := strings.NewReplacer("{s1}", s1.advertised, "{s2}", s2.advertised).Replace
	for _, f := range serfForms {
		switch f.line {
		case "members":
			waitAlive(t, []string{"s1"}, s1)
		case "force-leave s2":
			s2.kill()
			s1.waitStatus("s2", "failed")
		}
		words := strings.Fields(fill(f.line))
		out, errs, code := s1.run(words[0], words[1:]...)
		if code != 0 || errs != "" {
			t.Fatalf("%s: exit %d, %s", f.line, code, errs)
		}
		if diff := unlike(words, fill(f.prints), out); diff != "" {
			t.Errorf("%s: Serf's form, ours\n%s", f.line, diff)
		}
	}
	if code := s1.wait(); code != 0 {
		t.Errorf("the agent that left: exit %d", code)
	}
}

// unlike tells how the output differs from Serf's form. Text may have other
// blanks between its columns, and lines of a query come as they come; info, and
// JSON, may have more keys.
func unlike(words []string, serf, ours string) (diff string) {
	if strings.HasPrefix(serf, "{") {
		return strings.Join(lacking("", parsed(serf), parsed(ours)), "\n")
	}
	rows := func(text string) (rows []string) {
		for line := range strings.Lines(text) {
			rows = append(rows, strings.Join(strings.Fields(line), " "))
		}
		return rows
	}
	want, have := rows(serf), rows(ours)
	switch words[0] {
	case "info":
		var asWanted []string
		for _, row := range have {
			key, _, _ := strings.Cut(row, " = ")
			if slices.Contains(want, key+" = ?") {
				row = key + " = ?"
			}
			if len(asWanted) < len(want) && row == want[len(asWanted)] {
				asWanted = append(asWanted, row)
			}
		}
		have = asWanted
		if !regexp.MustCompile(`^(\w+:\n(\t.+ = .*\n)*)+$`).MatchString(ours) {
			return ours
		}
	case "query":
		slices.Sort(want[1 : len(want)-1])
		slices.Sort(have[1 : len(have)-1])
	}
	return cmp.Diff(want, have)
}

func parsed(text string) (v any) {
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return err.Error() + ": " + text
	}
	return v
}

// lacking tells what of Serf's JSON is not in ours, or is something else there.
func lacking(at string, serf, ours any) (all []string) {
	differ := func() []string { return []string{fmt.Sprintf("%s: %v, not %v", at, serf, ours)} }
	switch want := serf.(type) {
	case map[string]any:
		have, ok := ours.(map[string]any)
		if !ok {
			return differ()
		}
		for k, v := range want {
			all = append(all, lacking(at+"."+k, v, have[k])...)
		}
	case []any:
		have, ok := ours.([]any)
		if !ok || len(have) != len(want) {
			return differ()
		}
		for i, v := range want {
			all = append(all, lacking(fmt.Sprint(at, i), v, have[i])...)
		}
	case float64:
		if _, ok := ours.(float64); !ok {
			return differ()
		}
	default:
		if s, ok := ours.(string); !ok || want != s && want != "?" {
			return differ()
		}
	}
	return all
}

// A script written for Serf stops at its first unknown word, so each of them has
// an answer.
func TestSerfWordsThatAreNotHereAreAnsweredInOneLine(t *testing.T) {
	t.Parallel()
	said := make(map[string]string)
	for _, line := range []string{"agent -discover web", "agent -keyring-file k", "agent --tags-file t",
		"agent -mdns-iface eth0", "keys -list", "reachability -verbose", "rtt web1 web2", "monitor -log-level=debug"} {
		words := strings.Fields(line)
		word := words[0]
		if word == "agent" {
			word = "-" + strings.TrimLeft(words[1], "-")
		}
		out, errs, code := hamlet(t, words...)
		advice, ok := strings.CutPrefix(errs, "hamlet: error: hamlet has no "+word+": ")
		if code != 2 || out != "" || !ok || strings.Count(errs, "\n") != 1 || len(advice) < 20 {
			t.Errorf("%s: exit %d, stdout %q, stderr %q", line, code, out, errs)
		}
		said[advice] += " " + word
	}
	if len(said) < 7 { // -discover and -mdns-iface are about one thing
		t.Errorf("the same advice for many: %q", said)
	}
}

func TestSerfWordsThatChangeNothingAreTaken(t *testing.T) {
	t.Parallel()
	ran := filepath.Join(t.TempDir(), "ran")
	seed := startAgent(t, "-node", "seed", "-event-handler", "query:load=echo 1", "-event-handler",
		"query=echo 2")
	startAgent(t, "-node", "retry", "-role", "web", "-retry-join", seed.advertised, "-retry-interval",
		"10s")
	startAgent(t, "-node", "commas", "-join", freePort(t)+","+seed.advertised, "-event-handler",
		"user=cat >>"+ran)
	later := startAgent(t, "-node", "later", "-role", "weber")
	if out, errs, code := later.run("join", "-replay", seed.advertised); code != 0 ||
		!strings.Contains(out, "contacting 1 nodes") {
		t.Errorf("join -replay: exit %d, %s", code, errs)
	}
	waitAlive(t, []string{"seed", "retry", "commas", "later"}, seed)
	for line, want := range map[string]string{"-role web": "retry", "-role web.*": "later retry",
		"-detailed -name seed": "seed"} {
		out, errs, code := seed.run("members", strings.Fields(line)...)
		var names []string
		for row := range strings.Lines(out) {
			names = append(names, strings.Fields(row)[0])
		}
		if got := strings.Join(names, " "); code != 0 || got != want {
			t.Errorf("members %s: exit %d, %q, want %q, %s", line, code, got, want, errs)
		}
	}
}

func TestHelpIsShownForTheBareName(t *testing.T) {
	t.Parallel()
	all := helpOf(t, "")
	if out, errs, code := hamlet(t); code != 2 || out != all ||
		errs != "hamlet: error: no command given\n" {
		t.Errorf("alone: exit %d, stderr %q, stdout\n%s", code, errs, out)
	}
	if out, errs, code := hamlet(t, "help", "help"); code != 0 || out != all || errs != "" {
		t.Errorf("help help: exit %d, stderr %q, stdout\n%s", code, errs, out)
	}
}

func TestEnvironmentVariableThatIsUnknownIsOneWarning(t *testing.T) {
	t.Parallel()
	cmd := hamletCmd(agentArgs("-node", "a")...)
	cmd.Env = append(cmd.Env, "HAMLET_JION=10.0.0.1", "HAMLET_LOG_LEVEL=info",
		"HAMLET_RETRY_JOIN=127.0.0.1:1", "HAMLETS=2", "HAMLET_KEY_RING=secret")
	a := startAgentCmd(t, cmd)
	a.waitLog("member-join: a")
	for _, name := range []string{"HAMLET_JION", "HAMLET_KEY_RING"} {
		if n := a.count(name); n != 1 {
			t.Errorf("%d warnings of %s:\n%s", n, name, a.stderr)
		}
	}
	if n := a.count("there is no option"); n != 1 || a.count("secret") > 0 {
		t.Errorf("%d warnings, or a value is shown:\n%s", n, a.stderr)
	}
	cmd = hamletCmd(agentArgs("-node", "a", "-log-level", "err")...)
	cmd.Env = append(cmd.Env, "HAMLET_JION=10.0.0.1")
	a = startAgentCmd(t, cmd)
	a.int()
	a.wait()
	if a.count("HAMLET_JION") > 0 {
		t.Errorf("only errors are wanted:\n%s", a.stderr)
	}
}

// ---- what handlers are told and not told ----

// A restarted agent would run deploy and reboot again, and reboot again.
func TestEventFromBeforeTheStartRunsOnlyWithReplay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ran := func(name string) string { return readFile(filepath.Join(dir, name)) }
	start := func(name string, args ...string) *agent {
		return startAgent(t, append(args, "-node", name, "-event-handler",
			`user=echo "$SERF_USER_EVENT $(cat)" >>`+filepath.Join(dir, name))...)
	}
	a := start("a")
	b := start("b", "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, b)
	a.run("event", "deploy", "3f2c")
	eventually(t, "deploy runs on both", func() bool {
		return ran("a") == "deploy 3f2c\n" &&
			ran("b") == "deploy 3f2c\n"
	})
	start("agent", "-join", a.advertised)
	start("agent-replay", "-join", a.advertised, "-replay")
	for name, args := range map[string][]string{"join": {a.advertised},
		"join-replay": {"-replay", a.advertised}} {
		if _, errs, code := start(name).run("join", args...); code != 0 {
			t.Errorf("%s: exit %d, %s", name, code, errs)
		}
	}
	b.kill() // and is started again with nobody to join: the others find it
	a.waitStatus("b", "failed")
	start("b", "-bind", b.bind)
	waitAlive(t, []string{"a", "b", "agent", "agent-replay", "join", "join-replay"}, a)
	a.run("event", "end")
	for name, want := range map[string]string{"a": "deploy 3f2c\nend \n", "b": "deploy 3f2c\nend \n",
		"agent":        "end \n",
		"agent-replay": "deploy 3f2c\nend \n", "join": "end \n", "join-replay": "deploy 3f2c\nend \n"} {
		eventually(t, "the end runs on "+name, func() bool {
			return strings.HasSuffix(ran(name),
				"end \n")
		})
		if diff := cmp.Diff(want, ran(name)); diff != "" {
			t.Errorf("%s: wanted, ran\n%s", name, diff)
		}
	}
}

// underground starts agents in a network of their own, on one loopback.
type underground struct {
	t     *testing.T
	first *agent
}

func (u *underground) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net",
		u.first.cmd.Process.Pid), name}, args...)...)
	cmd.Env = hamletCmd().Env
	return cmd
}

func (u *underground) start(ip, name string, args ...string) *agent {
	u.t.Helper()
	args = append([]string{"agent", "-node", name, "-bind", ip + ":7946", "-rpc-addr", "127.0.0.1:0"},
		args...)
	if u.first != nil {
		return startAgentCmd(u.t, u.command(program, args...))
	}
	cmd := exec.Command("unshare", append([]string{"--net", "sh", "-c",
		`ip link set lo up && exec "$0" "$@"`, program}, args...)...)
	cmd.Env = hamletCmd().Env
	u.first = startAgentCmd(u.t, cmd)
	return u.first
}

// firewall adds or deletes the rules that cut an address off from all others.
func (u *underground) firewall(rule, ip string) {
	u.t.Helper()
	for from, to := range map[string]string{"-s": "-d", "-d": "-s"} {
		cmd := u.command("iptables", "-w", rule, "INPUT", from, ip, "!", to, ip, "-j", "DROP")
		if out, err := cmd.CombinedOutput(); err != nil {
			u.t.Fatalf("%v: %v: %s", cmd.Args, err, out)
		}
	}
}

func TestIsolationIsToldToTheHandlersOfTheNodeThatIsCutOff(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"nsenter", "ip", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: there is no %s here", tool)
		}
	}
	if err := exec.Command("unshare", "--net", "true").Run(); err != nil {
		t.Skipf("SKIPPED: no network namespace to be had here: %v", err)
	}
	dir, u := t.TempDir(), &underground{t: t}
	handler := func(name string) string {
		return `*=while read -r name ip rest; do echo "$SERF_EVENT $name alone=$SERF_SELF_ALONE" >>` +
			filepath.Join(dir, name) + "; done"
	}
	heard := func(name, line string) bool {
		return strings.Contains(readFile(filepath.Join(dir, name)), line+"\n")
	}
	var joined []*agent
	for i, name := range []string{"a", "b", "lonely"} {
		joined = append(joined, u.start(fmt.Sprint("127.0.0.", 2+i), name, "-join", "127.0.0.2",
			"-event-handler", handler(name)))
	}
	for _, a := range joined {
		for _, name := range []string{"a", "b", "lonely"} {
			a.waitLine(memberLine("member-join", name,
				map[string]string{"a": "127.0.0.2", "b": "127.0.0.3", "lonely": "127.0.0.4"}[name]))
		}
	}
	u.firewall("-A", "127.0.0.4")
	eventually(t, "the lonely one's handlers run", func() bool {
		return heard("lonely", "member-failed a alone=1") && heard("lonely", "member-failed b alone=1")
	})
	cutOff := func(a *agent) bool {
		out, _, _ := runCmd(t, u.command(asker, "info", "-rpc-addr", a.rpc))
		return strings.Contains(out, "\tcut_off = true\n") && strings.Contains(out, "\tfailed = 2\n")
	}
	if !cutOff(joined[2]) || cutOff(joined[0]) {
		t.Error("info does not tell which node is cut off")
	}
	eventually(t, "the others' run", func() bool {
		return heard("a", "member-failed lonely alone=") && heard("b", "member-failed lonely alone=")
	})
	u.firewall("-D", "127.0.0.4")
	eventually(t, "it is alone no more", func() bool {
		return heard("lonely", "member-join a alone=") && heard("lonely", "member-join b alone=")
	})
	if heard("lonely", "member-failed a alone=") || heard("lonely", "member-failed b alone=") {
		t.Errorf("the lonely one blames others:\n%s", readFile(filepath.Join(dir, "lonely")))
	}
	for _, name := range []string{"a", "b"} {
		if text := readFile(filepath.Join(dir, name)); strings.Contains(text, "alone=1") {
			t.Errorf("%s was told that it is alone:\n%s", name, text)
		}
	}
}

// Serf's keys are EVENT:NAME, one for each event; and no JSON holds a key twice.
func TestInfoNamesHandlersAsSerfDoes(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-event-handler", "query:load=echo 0.5", "-event-handler",
		"member-join,member-failed=true",
		"-event-handler", "true", "-event-handler", "echo second")
	out, _, _ := a.run("info", "-format", "json")
	serf := parsed(`{"event_handlers": {"query:load": "echo 0.5", "member-join:": "true", "member-failed:": "true"}}`)
	for _, l := range lacking("", serf, parsed(out)) {
		t.Error(l)
	}
	_, handlers, _ := strings.Cut(out, `"event_handlers": {`)
	handlers, _, _ = strings.Cut(handlers, "}")
	keys := regexp.MustCompile(`(?m)^ +"(.*)": ".*",?$`).FindAllStringSubmatch(handlers, -1)
	seen := make(map[string]bool)
	for _, k := range keys {
		if seen[k[1]] {
			t.Errorf("the key %q comes twice:\n%s", k[1], handlers)
		}
		seen[k[1]] = true
	}
	if !strings.Contains(handlers, `"*:": "true, echo second"`) {
		t.Errorf("handlers:\n%s", handlers)
	}
}

// Serf: "Acks": null.
func TestQueryJSONHasNoAcksWhereNoneAreWanted(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-event-handler", "query:load=echo 0.5")
	out, _, code := a.run("query", "-no-ack", "-format", "json", "load")
	var js struct {
		Acks      []string
		Responses map[string]string
	}
	if err := json.Unmarshal([]byte(out), &js); err != nil || code != 0 || len(js.Acks) > 0 ||
		js.Responses["a"] != "0.5\n" {
		t.Errorf("exit %d, %v, %s", code, err, out)
	}
}
