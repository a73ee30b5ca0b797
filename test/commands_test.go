package test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// optionsOf are the options that each command has; what is new need not be here.
var optionsOf = map[string]string{
	"agent": "node role tag bind advertise iface rpc-addr rpc-auth join retry-max cluster encrypt reap-after leave-on-terminate " +
		"event-handler handler-timeout log-level",
	"members":     "status name tag format wait timeout rpc-addr rpc-auth",
	"join":        "rpc-addr rpc-auth",
	"leave":       "rpc-addr rpc-auth",
	"force-leave": "prune rpc-addr rpc-auth",
	"event":       "coalesce rpc-addr rpc-auth",
	"keygen":      "",
	"version":     "",
}

func TestHelpBeginsWithCommandsAndFits80Columns(t *testing.T) {
	names := commandNames(t)
	for name := range optionsOf {
		if !slices.Contains(names, name) {
			t.Errorf("help does not list %s", name)
		}
	}
	for _, name := range append(names, "") {
		text := helpOf(t, name)
		usage, examples, _ := strings.Cut(text, "\n\n")
		if name == "" {
			examples = text
		} else if !strings.HasPrefix(usage, "Usage: hamlet "+name) || strings.Contains(usage, "\n") {
			t.Errorf("help %s does not begin with its usage line:\n%s", name, text)
		}
		if !strings.HasPrefix(examples, "  hamlet ") {
			t.Errorf("help %s has no commands to copy at its beginning:\n%s", name, text)
		}
		for line := range strings.Lines(text) {
			if len(strings.ReplaceAll(line, "    \t", "        ")) > 81 || strings.TrimRight(line, " \n") != strings.TrimSuffix(line, "\n") {
				t.Errorf("help %s: bad line %q", name, line)
			}
		}
		if name == "" {
			continue
		}
		var shown []string
		for _, m := range regexp.MustCompile(`\n  -(\S+)`).FindAllStringSubmatch(text, -1) {
			if slices.Contains(shown, m[1]) {
				t.Errorf("help %s explains -%s twice", name, m[1])
			}
			shown = append(shown, m[1])
		}
		for _, option := range strings.Fields(optionsOf[name]) {
			if !slices.Contains(shown, option) {
				t.Errorf("help %s does not explain -%s", name, option)
			}
		}
		for _, flag := range []string{"-h", "-help", "--help"} {
			if out, _, code := hamlet(t, name, flag); code != 0 || out != text {
				t.Errorf("%s %s: exit %d, not the text of help %s", name, flag, code, name)
			}
		}
	}
}

func TestKeygenMakesKeysThatAgentsTake(t *testing.T) {
	one, _, _ := hamlet(t, "keygen")
	two, _, _ := hamlet(t, "keygen")
	if one == two {
		t.Error("the same key twice")
	}
	startAgent(t, "-encrypt", strings.TrimSuffix(one, "\n"), "-encrypt", two)
	startAgent(t, "-encrypt", strings.TrimSuffix(one, "\n")+","+two) // as the advice about Serf's keys has it
}

func TestVersionIsThatOfTheNewestChange(t *testing.T) {
	heading := regexp.MustCompile(`(?m)^## (\S+) `).FindStringSubmatch(readFile("CHANGELOG.md"))
	if heading == nil {
		t.Fatal("CHANGELOG.md has no version")
	}
	want := "hamlet " + heading[1] + " ("
	for _, arg := range []string{"version", "-version", "--version", "-v"} {
		if out, errs, code := hamlet(t, arg); code != 0 || errs != "" || !strings.HasPrefix(out, want) || !strings.Contains(out, "protocol ") {
			t.Errorf("%s: %q %q %d", arg, out, errs, code)
		}
	}
}

func TestUsageAndErrorsHaveTheNameOfTheCall(t *testing.T) {
	call := serfIn(t, t.TempDir())
	if out, _, _ := runCmd(t, call("help", "members")); !strings.HasPrefix(out, "Usage: serf members") || strings.Contains(out, "hamlet") {
		t.Errorf("help members of serf:\n%s", out)
	}
	if _, errs, _ := runCmd(t, call("members", "-rpc-addr", freePort(t))); !strings.HasPrefix(errs, "serf: error: ") || !strings.Contains(errs, "'serf agent'") {
		t.Errorf("error of serf: %s", errs)
	}
}

func TestErrorsNameTheValueAndGiveAHint(t *testing.T) {
	taken, free := takenPort(t), freePort(t)
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{'k'}, 32))
	long := strings.Repeat("x", 600)
	agent := func(args ...string) []string { return agentArgs(append([]string{"-node", "a"}, args...)...) }
	tests := []struct {
		args []string
		code int
		want []string // in stderr
	}{
		{[]string{"dance"}, 2, []string{`no command "dance"`, "hint: 'hamlet help'"}},
		{[]string{"help", "dance"}, 2, []string{`no command "dance"`}},
		{[]string{"members", "-colour"}, 2, []string{"there is no option -colour", "hint: 'hamlet help members'"}},
		{[]string{"agent", "-node"}, 2, []string{"-node needs a value"}},
		{[]string{"query", "-node", "", "load"}, 2, []string{"-node: the node name is empty"}},
		{agent("extra"), 2, []string{`unexpected argument "extra"`, "hint: 'hamlet help agent'"}},
		{agent("-log-level", "loud"), 2, []string{`"loud"`, "trace, debug, info, warn, err"}},
		{agent("-retry-max", "-1"), 2, []string{`"-1"`, "-retry-max"}},
		{agent("-handler-timeout", "10"), 2, []string{`"10"`, "-handler-timeout", "20s"}},
		{agent("-reap-after", "0s"), 2, []string{`"0s"`, "-reap-after"}},
		{agent("-leave-on-terminate=maybe"), 2, []string{`"maybe"`, "true or false"}},
		{agent("-bind", "nowhere.invalid"), 1, []string{`"nowhere.invalid"`, "hint: -bind takes HOST:PORT"}},
		{agent("-bind", "224.0.0.1"), 2, []string{`"224.0.0.1"`, "hint: -bind takes HOST:PORT"}},
		{agent("-bind", "10.0.0.1:99999"), 2, []string{`"10.0.0.1:99999"`}},
		{agent("-bind", "1.2.3"), 2, []string{`"1.2.3"`}},
		{agent("-bind", taken), 1, []string{"cannot listen on " + taken, "address already in use", "hint:", "-bind"}},
		{agent("-bind", "198.51.100.7:7946"), 1, []string{"198.51.100.7:7946", "hint:", "no such address"}},
		{agent("-rpc-addr", taken), 1, []string{"cannot listen on " + taken + " for the RPC", "hint: is an agent running", "-rpc-addr"}},
		{agent("-rpc-addr", "a:b:c"), 2, []string{`"a:b:c"`, "hint: -rpc-addr takes HOST:PORT"}},
		{agent("-advertise", "0.0.0.0"), 2, []string{"0.0.0.0", "-advertise"}},
		{agent("-advertise", "a b"), 2, []string{`"a b"`, "-advertise"}},
		{agent("-iface", "nope0"), 1, []string{`"nope0"`, "-iface"}}, // it may be there soon
		{agent("-iface", "lo", "-bind", "198.51.100.7:7946"), 1, []string{"-iface lo", "-bind 198.51.100.7:7946"}},
		{agent("-encrypt", ""), 2, []string{"-encrypt", "empty"}},
		{agent("-encrypt", " "), 2, []string{"-encrypt", "empty"}},
		{agent("-rpc-auth", ""), 2, []string{"-rpc-auth", "empty"}},
		{agent("-cluster", ""), 2, []string{"-cluster", "empty"}},
		{agent("-iface", "lo", "-advertise", "10.0.0.1"), 2, []string{"lo", "10.0.0.1", "one of them"}},
		{agent("-join", "a b"), 2, []string{`-join: "a b"`, "hint:"}},
		{agent("-join", "host:port"), 2, []string{`"host:port"`, "hint:"}},
		{agent("-join", "10.0.0.1:0"), 2, []string{`"10.0.0.1:0"`, "hint:"}},
		{agent("-join", ""), 2, []string{`""`, "hint:"}},
		{agent("-node", "two words"), 2, []string{`"two words"`, "hint:", "-node"}},
		{agent("-node", strings.Repeat("n", 129)), 2, []string{"129 bytes", "128"}},
		{agent("-tag", "role"), 2, []string{`"role"`, "want KEY=VALUE, such as role=web"}},
		{agent("-tag", "=x"), 2, []string{`"=x"`}},
		{agent("-tag", "a="+long), 2, []string{"602 bytes", "512"}},
		{agent("-role", "db", "-tag", "role=web"), 2, []string{`"db"`, `"role=web"`}},
		{agent("-event-handler", "member-jion=x"), 2, []string{"member-jion", "hint:"}},
		{agent("-encrypt", "c2hvcnQ="), 2, []string{"key 1 of 1 has 5 bytes", "32", "hamlet keygen"}},
		{agent("-encrypt", key, "-encrypt", "%%%"), 2, []string{"key 2 of 2 is not base64", "hamlet keygen"}},
		{agent("-encrypt", key+","), 2, []string{"key 2 of 2 has 0 bytes", "hamlet keygen"}},
		{[]string{"members", "-rpc-addr", free}, 1, []string{free, "connection refused", "hint: is the agent running?", "'hamlet agent'", "-rpc-addr"}},
		{[]string{"members", "-rpc-addr", "no where"}, 2, []string{`"no where"`}},
		{[]string{"members", "-name", "("}, 2, []string{`"("`, "-name", "regular expression"}},
		{[]string{"members", "-status", "["}, 2, []string{`"["`, "-status"}},
		{[]string{"members", "-tag", "role=*"}, 2, []string{`"*"`, "-tag"}},
		{[]string{"members", "-tag", "role"}, 2, []string{`"role"`, "KEY=RE"}},
		{[]string{"members", "-format", "xml"}, 2, []string{`"xml"`, "text or json"}},
		{[]string{"members", "-wait", "three"}, 2, []string{`"three"`, "-wait"}},
		{[]string{"members", "-timeout", "1s"}, 2, []string{"-wait"}},
		{[]string{"members", "web"}, 2, []string{`"web"`}},
		{[]string{"join"}, 2, []string{"ADDR", "missing"}},
		{[]string{"join", "not an address"}, 2, []string{`"not an address"`}},
		{[]string{"join", "-rpc-addr", free, "127.0.0.1"}, 1, []string{free}},
		{[]string{"force-leave"}, 2, []string{"NAME"}},
		{[]string{"force-leave", "a", "b"}, 2, []string{`"b"`}},
		{[]string{"membrs"}, 2, []string{`"membrs"`, "did you mean 'hamlet members'?"}},
		{[]string{"members", "-stauts", "alive"}, 2, []string{"-stauts", "did you mean -status?"}},
		{[]string{"event"}, 2, []string{"NAME"}},
		{[]string{"event", "deploy", "-coalesce=false", "-rpc-addr", free}, 1, []string{free}},
		{[]string{"keygen", "now"}, 2, []string{`"now"`}},
	}
	for _, tt := range tests {
		name := strings.Join(tt.args, " ")
		out, errs, code := hamlet(t, tt.args...)
		if code != tt.code || out != "" || !strings.HasPrefix(errs, "hamlet: error: ") {
			t.Errorf("%.80s: exit %d, stdout %q, stderr %q; want exit %d", name, code, out, errs, tt.code)
		}
		for _, w := range tt.want {
			if !strings.Contains(errs, w) {
				t.Errorf("%.80s: no %q in %q", name, w, errs)
			}
		}
		if strings.Contains(errs, "goroutine") || strings.Count(errs, "\n") > 2 {
			t.Errorf("%.80s: too much: %s", name, errs)
		}
	}
}

func TestKeyIsNeverShown(t *testing.T) {
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{'k'}, 32))
	short := key[4:]
	for _, args := range [][]string{
		agentArgs("-encrypt", short), agentArgs("-encrypt", key, key, "x"), agentArgs("-encrypt", key, key+","+key), agentArgs("-encrypt", key, "-bind", "x"), {"agent", "-h", "-encrypt", key},
	} {
		if out, errs, _ := hamlet(t, args...); strings.Contains(out+errs, short[:20]) {
			t.Errorf("%v shows the key: %s%s", args, out, errs)
		}
	}
	for _, v := range []string{short, key + ",bad", `"` + key + "," + key + `"`} {
		cmd := hamletCmd(agentArgs()...)
		cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+v)
		if out, errs, code := runCmd(t, cmd); code != 2 || strings.Contains(out+errs, short[:20]) {
			t.Errorf("exit %d, or the key is shown: %s%s", code, out, errs)
		}
	}
	cmd := hamletCmd(agentArgs("-log-level", "trace", "-event-handler", "env; tr '\\0' ' ' < /proc/$PPID/cmdline; echo; echo done")...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT="+key)
	a := startAgentCmd(t, cmd)
	a.waitLog("\n\tdone\n")
	a.int()
	a.wait()
	if s := a.stdout.String() + a.stderr.String(); strings.Contains(s, short[:20]) || strings.Contains(s, "HAMLET_ENCRYPT") {
		t.Error("the key reached the log, the command line or the handler's environment")
	}
}

func TestBannerTellsNameAndAddresses(t *testing.T) {
	a := startAgent(t, "-node", "precise64", "-bind", "0.0.0.0:0", "-advertise", "127.0.0.1")
	_, port, _ := net.SplitHostPort(a.bind)
	want := fmt.Sprintf(`==> Starting hamlet agent...
==> Starting hamlet agent RPC...
==> hamlet agent running!
    Node name: 'precise64'
    Bind addr: '0.0.0.0:%s'
    Advertise: '127.0.0.1:%s' (set with -advertise)
     RPC addr: '%s'
`, port, port, a.rpc)
	if diff := cmp.Diff(want, strings.TrimSuffix(a.stdout.String(), "    Encrypted: false\n")); diff != "" {
		t.Error(diff)
	}
	a.waitLine(memberLine("member-join", "precise64", "127.0.0.1"))
	if line := a.stderr.String(); !regexp.MustCompile(`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[INFO\] `).MatchString(line) {
		t.Errorf("log: %q", line)
	}
}

func TestAgentOnATakenPortIsToldSo(t *testing.T) {
	a := startAgent(t)
	for option, addr := range map[string]string{"-rpc-addr": a.rpc, "-bind": a.bind} {
		_, errs, code := hamlet(t, agentArgs(option, addr)...)
		if code != 1 || !strings.Contains(errs, addr) || !strings.Contains(errs, "in use") || !strings.Contains(errs, "hint: is an agent running there already? choose another address with "+option) {
			t.Errorf("%s %s: exit %d, %s", option, addr, code, errs)
		}
	}
}

func TestRPCAddressOfAnotherKindIsNotTakenForAnAgent(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	_, errs, code := hamlet(t, "members", "-rpc-addr", a.advertised)
	if code != 1 || !strings.Contains(errs, a.advertised) || !strings.Contains(errs, "hint: ") {
		t.Errorf("members at the gossip port: exit %d, %s", code, errs)
	}
}

func TestMembersFiltersAndFormats(t *testing.T) {
	t.Parallel()
	web1 := startAgent(t, "-node", "web1", "-role", "web", "-tag", "zone=a")
	web2 := startAgent(t, "-node", "web2", "-role", "web", "-tag", "zone=ab", "-join", web1.advertised)
	db := startAgent(t, "-node", "db", "-tag", "role=db", "-join", web1.advertised)
	names := func(args ...string) string {
		out, errs, code := web1.run("members", args...)
		if code != 0 || errs != "" {
			t.Errorf("members %v: exit %d, %s", args, code, errs)
		}
		var found []string
		for line := range strings.Lines(out) {
			found = append(found, strings.Fields(line)[0])
		}
		return strings.Join(found, " ")
	}
	names("-wait", "3", "-timeout", "15s")
	out, _, _ := web1.run("members")
	want := fmt.Sprintf("%-4s    %-15s    alive     role=db\n%-4s    %-15s    alive     role=web,zone=a\n%-4s    %-15s    alive     role=web,zone=ab\n",
		"db", db.advertised, "web1", web1.advertised, "web2", web2.advertised)
	if out != want {
		t.Error(cmp.Diff(want, out))
	}
	db.kill()
	web1.waitStatus("db", "failed")
	for args, want := range map[string]string{
		"":                               "db web1 web2",
		"-status alive":                  "web1 web2",
		"-status failed|left":            "db",
		"-status ali":                    "",
		"-name web.":                     "web1 web2",
		"-name we":                       "",
		"-tag role=web":                  "web1 web2",
		"-tag role=web -tag zone=a":      "web1",
		"-tag zone=.*":                   "web1 web2",
		"-tag none=.*":                   "",
		"-name .*1|db -status alive":     "web1",
		"--name=db":                      "db",
		"-name db|web1 -tag role=[bd]+":  "db",
		"-wait 2 -name web1 -timeout 1s": "",
	} {
		if strings.Contains(args, "-wait") {
			if _, errs, code := web1.run("members", strings.Fields(args)...); code != 1 || !strings.Contains(errs, "1 of 2 members alive after 1s") {
				t.Errorf("members %s: exit %d, %s", args, code, errs)
			}
		} else if got := names(strings.Fields(args)...); got != want {
			t.Errorf("members %s: %q, want %q", args, got, want)
		}
	}
	var js struct{ Members []member }
	out, _, _ = web1.run("members", "-format", "json", "-name", "web2")
	if err := json.Unmarshal([]byte(out), &js); err != nil || len(js.Members) != 1 {
		t.Fatalf("json: %v\n%s", err, out)
	}
	if m := js.Members[0]; m.Name != "web2" || m.Addr != web2.advertised || m.Status != "alive" || !strings.HasSuffix(m.Addr, fmt.Sprint(":", m.Port)) || m.Tags["zone"] != "ab" {
		t.Errorf("json: %s", out)
	}
}

func TestMembersWaitAlsoWaitsForTheAgentItself(t *testing.T) {
	t.Parallel()
	rpc := freePort(t)
	if _, errs, code := hamlet(t, "members", "-rpc-addr", rpc, "-wait", "1", "-timeout", "300ms"); code != 1 || !strings.Contains(errs, "no agent answers at "+rpc) {
		t.Errorf("nobody there: exit %d, %s", code, errs)
	}
	waiting := launch(t, hamletCmd("members", "-rpc-addr", rpc, "-wait", "2", "-timeout", "20s"), here)
	a := startAgent(t, "-node", "a", "-rpc-addr", rpc)
	startAgent(t, "-node", "b", "-join", a.advertised)
	if code := waiting.wait(); code != 0 || strings.Count(waiting.stdout.String(), "alive\n") != 2 {
		t.Errorf("exit %d, %s%s", code, waiting.stdout, waiting.stderr)
	}
}

func TestCommandGivesUpAStoppedAgentAfterFiveSeconds(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	a.signal(syscall.SIGSTOP)
	start := time.Now()
	_, errs, code := a.run("members")
	if took := time.Since(start); took < 4*time.Second || took > 9*time.Second {
		t.Errorf("gave up after %v", took)
	}
	if code != 1 || !strings.Contains(errs, a.rpc+" did not answer within 5s") || !strings.Contains(errs, "hint:") {
		t.Errorf("exit %d, %s", code, errs)
	}
}

func TestOptionsComeFromTheEnvironmentAndFlagsWin(t *testing.T) {
	t.Parallel()
	seed := startAgent(t, "-node", "seed")
	cmd := hamletCmd("agent", "-tag", "flag=wins")
	cmd.Env = append(cmd.Env, "HAMLET_NODE=envy", "HAMLET_BIND=127.0.0.1:0", "HAMLET_RPC_ADDR=127.0.0.1:0", "HAMLET_RPC_AUTH=sesame",
		"HAMLET_JOIN=127.0.0.1:1,"+seed.advertised, "HAMLET_TAG=env=loses", "HAMLET_ROLE=web", "HAMLET_LOG_LEVEL=debug", "HAMLET_RETRY_MAX=",
		"HAMLET_EVENT_HANDLER=member-join,member-failed=echo handler:$SERF_EVENT,user=echo user-handler", "HAMLET_LEAVE_ON_TERMINATE=true")
	a := startAgentCmd(t, cmd)
	if a.name != "envy" {
		t.Errorf("node name %s", a.name)
	}
	seed.waitStatus("envy", "alive")
	if tags := seed.member("envy").Tags; !maps.Equal(tags, map[string]string{"flag": "wins", "role": "web"}) {
		t.Errorf("tags %q", tags)
	}
	a.waitLog("handler:member-join")

	ask := func(env ...string) (string, string, int) {
		cmd := hamletCmd("members", "-name", "envy")
		cmd.Env = append(cmd.Env, env...)
		return runCmd(t, cmd)
	}
	if _, errs, code := ask("SERF_RPC_ADDR=" + a.rpc); code != 1 || !strings.Contains(errs, "wants a token") || !strings.Contains(errs, "SERF_RPC_AUTH") {
		t.Errorf("without a token: exit %d, %s", code, errs)
	}
	if _, errs, code := ask("SERF_RPC_ADDR="+a.rpc, "SERF_RPC_AUTH=melon"); code != 1 || !strings.Contains(errs, "another token") || strings.Contains(errs, "melon") {
		t.Errorf("with a wrong token: exit %d, %s", code, errs)
	}
	for _, prefix := range []string{"SERF_", "HAMLET_"} { // a container's settings serve both
		if out, errs, code := ask(prefix+"RPC_ADDR="+a.rpc, prefix+"RPC_AUTH=sesame"); code != 0 || !strings.HasPrefix(out, "envy ") {
			t.Errorf("with %sRPC_AUTH: exit %d, %s", prefix, code, errs)
		}
	}
	a.term()
	if code := a.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
	seed.waitStatus("envy", "left")
}

func TestEnvironmentVariableWithABadValueIsNamed(t *testing.T) {
	cmd := hamletCmd(agentArgs()...)
	cmd.Env = append(cmd.Env, "HAMLET_HANDLER_TIMEOUT=soon")
	if _, errs, code := runCmd(t, cmd); code != 2 || !strings.Contains(errs, `"soon" for HAMLET_HANDLER_TIMEOUT`) {
		t.Errorf("exit %d, %s", code, errs)
	}
}

// A secret that a template left empty is one that is missing.
func TestEnvironmentSecretThatIsEmptyIsRefused(t *testing.T) {
	t.Parallel()
	for _, variable := range []string{"HAMLET_ENCRYPT", "HAMLET_RPC_AUTH", "HAMLET_CLUSTER"} {
		for _, value := range []string{"", " ", "\n"} {
			cmd := hamletCmd(agentArgs()...)
			cmd.Env = append(cmd.Env, variable+"="+value)
			a := launch(t, cmd, here)
			wantEnd(t, fmt.Sprintf("%s=%q", variable, value), a.exit(5*time.Second), 2, a.stderr.String(), variable, "empty")
		}
	}

	cmd := hamletCmd(agentArgs("-encrypt", testKeys[0], "-rpc-auth", "tok", "-cluster", "c")...)
	cmd.Env = append(cmd.Env, "HAMLET_ENCRYPT=", "HAMLET_RPC_AUTH=", "HAMLET_CLUSTER=", "HAMLET_NODE=", "HAMLET_JOIN=", "HAMLET_BIND=")
	startAgentCmd(t, cmd) // a flag wins, and what is no secret may be empty
}

func TestEnvironmentThatServicesSetIsNoWarning(t *testing.T) {
	t.Parallel()
	cmd := hamletCmd(agentArgs("-node", "a")...)
	cmd.Env = append(cmd.Env, "HAMLET_SERVICE_HOST=10.0.0.1", "HAMLET_SERVICE_PORT=7946", "HAMLET_SERVICE_PORT_GOSSIP_TCP=7946",
		"HAMLET_PORT=tcp://10.0.0.1:7946", "HAMLET_PORT_7946_TCP=tcp://10.0.0.1:7946", "HAMLET_PORT_7946_TCP_PROTO=tcp",
		"HAMLET_PORT_7946_TCP_PORT=7946", "HAMLET_PORT_7946_TCP_ADDR=10.0.0.1", "HAMLET_PORT_7946_UDP=udp://10.0.0.1:7946",
		"HAMLET_NAME=/web/hamlet", "HAMLET_ENV_DEBIAN_FRONTEND=noninteractive",
		"HAMLET_WEB_SERVICE_HOST=10.0.0.2", "HAMLET_WEB_PORT=tcp://10.0.0.2:80", "HAMLET_WEB_PORT_80_TCP=tcp://10.0.0.2:80")
	a := startAgentCmd(t, cmd)
	a.waitLog("member-join: a")
	if n := a.count("[WARN]"); n > 0 {
		t.Errorf("it warns:\n%s", a.stderr)
	}

	cmd = hamletCmd(agentArgs("-node", "b")...)
	cmd.Env = append(cmd.Env, "HAMLET_PORT=7946", "HAMLET_NAME=web1", "HAMLET_SERVICE_HOST=10.0.0.1", "HAMLET_JION=10.0.0.1")
	b := startAgentCmd(t, cmd)
	b.waitLog("HAMLET_JION")
	for name, want := range map[string]int{"[WARN]": 1, "HAMLET_PORT": 1, "HAMLET_NAME": 1, "HAMLET_SERVICE_HOST": 0} {
		if n := b.count(name); n != want {
			t.Errorf("%s: %d times, want %d:\n%s", name, n, want, b.stderr)
		}
	}
}

// Ctrl-\ is a way to stop a command that waits, and no crash.
func TestQuitShowsNoStack(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := hamletCmd("members", "-rpc-addr", ln.Addr().String(), "-wait", "1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := ln.Accept() // now it waits for an answer
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cmd.Process.Signal(syscall.SIGQUIT)
	if cmd.Wait(); out.Len() > 0 || cmd.ProcessState.ExitCode() != 128+3 {
		t.Errorf("exit %d: %s", cmd.ProcessState.ExitCode(), out.String())
	}
}

// ---- tags, query, watch, info ----

// wantEnd reports an end of a command that is not as wanted: the exit status, and
// words in its error; none: it has no error.
func wantEnd(t *testing.T, what string, code, wantCode int, errs string, words ...string) {
	t.Helper()
	if code != wantCode || (len(words) == 0) != (errs == "") {
		t.Errorf("%.80s: exit %d, stderr %q", what, code, errs)
	}
	for _, w := range words {
		if !strings.Contains(errs, w) {
			t.Errorf("%.80s: no %q in %q", what, w, errs)
		}
	}
}

func TestTagsOfARunningAgentReachEverybodyAsOneUpdate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	own, peers := filepath.Join(dir, "own"), filepath.Join(dir, "peers")
	a := startAgent(t, "-node", "a", "-tag", "role=web", "-event-handler",
		`user=echo "[$SERF_TAG_STATE] [$SERF_TAG_ROLE]" >>`+own)
	b := startAgent(t, "-node", "b", "-join", a.advertised, "-event-handler",
		`*=while read -r line; do echo "$SERF_EVENT $line"; done >>`+peers,
		"-event-handler", `user=echo "$SERF_USER_EVENT" >>`+peers)
	waitAlive(t, []string{"a", "b"}, a, b)
	set := func(want string, args ...string) {
		t.Helper()
		out, errs, code := a.run("tags", args...)
		wantEnd(t, strings.Join(args, " "), code, 0, errs)
		if out != "Successfully updated agent tags\n" {
			t.Errorf("tags %v prints %q", args, out)
		}
		row := regexp.MustCompile(`(?m)^a +\S+ +alive +` + regexp.QuoteMeta(want) + `$`)
		for _, who := range []*agent{a, b} {
			eventually(t, who.name+" shows "+want,
				func() bool { out, _, _ := who.run("members"); return row.MatchString(out) })
		}
	}
	set("role=web,state=drain,zone=b", "-set", "state=drain", "-set", "zone=b")
	a.run("event", "one")
	eventually(t, "the own handler runs", func() bool { return readFile(own) != "" })
	set("role=db,state=ok", "-set", "state=ok", "-set", "role=db", "-delete", "zone")
	set("role=db,state=ok", "-set", "state=ok", "-delete", "nothing") // as it is: no news
	a.run("event", "two")
	eventually(t, "the own handler runs again", func() bool {
		return strings.Count(readFile(own),
			"\n") == 2
	})
	if got := readFile(own); got != "[drain] [web]\n[ok] [db]\n" {
		t.Errorf("the own handlers saw %q", got)
	}
	eventually(t, "the last event reaches b", func() bool {
		return strings.Contains(readFile(peers),
			"two\n")
	})
	var seen []string
	for line := range strings.Lines(readFile(peers)) {
		if strings.HasPrefix(line, "member-") && strings.Fields(line)[1] == "a" {
			seen = append(seen, line)
		}
	}
	want := []string{"member-join a\t127.0.0.1\tweb\trole=web\n",
		"member-update a\t127.0.0.1\tweb\trole=web,state=drain,zone=b\n",
		"member-update a\t127.0.0.1\tdb\trole=db,state=ok\n"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("handlers at a peer: wanted, ran\n%s", diff)
	}
	if n := b.count("member-update: a "); n != 2 || b.count("member-failed") > 0 {
		t.Errorf("%d updates in the log:\n%s", n, b.stderr)
	}
}

func TestTagsThatAreRefusedChangeNothing(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-tag", "state="+strings.Repeat("s", 20))
	before := a.member("a").Tags
	long := strings.Repeat("x", 500)
	for _, c := range []struct {
		code int
		args []string
		want []string
	}{
		{2, nil, []string{"nothing to change", "-set or -delete", "hint: "}},
		{2, []string{"-set", "state"}, []string{`"state"`, "KEY=VALUE"}},
		{2, []string{"-set", "good=1", "-set", "=x"}, []string{`"=x"`, "key"}},
		{2, []string{"-set", "a=" + long + long}, []string{"1002 bytes", "512"}},
		{1, []string{"-set", "a=" + long}, []string{"529 bytes", "512"}}, // with those that are there
		{2, []string{"state=ok"}, []string{`"state=ok"`, "hint: "}},
	} {
		out, errs, code := a.run("tags", c.args...)
		wantEnd(t, "tags "+strings.Join(c.args, " "), code, c.code, errs, c.want...)
		if out != "" || !strings.HasPrefix(errs, "hamlet: error: ") {
			t.Errorf("tags %.80q prints %q, stderr %q", c.args, out, errs)
		}
		if tags := a.member("a").Tags; !maps.Equal(tags, before) {
			t.Fatalf("tags %.80q left %q", c.args, tags)
		}
	}
	if a.count("member-update") > 0 {
		t.Errorf("it was updated:\n%s", a.stderr)
	}
}

// askQuery asks a query, whose time is long, and returns the lines that are printed, those
// of members sorted.
func (a *agent) askQuery(wantCode int, wantErr []string, args ...string) (lines []string) {
	a.t.Helper()
	start, what := time.Now(), "query "+strings.Join(args, " ")
	out, errs, code := a.run("query", args...)
	if took := time.Since(start); took > 4*time.Second*busy {
		a.t.Errorf("%s took %v", what, took)
	}
	wantEnd(a.t, what, code, wantCode, errs, wantErr...)
	if lines = strings.Split(strings.TrimSuffix(out, "\n"), "\n"); len(lines) > 2 {
		slices.Sort(lines[1 : len(lines)-2])
	}
	return lines
}

// querySite is a cluster of which two answer and one does not.
func querySite(t *testing.T) (web1, web2, db *agent) {
	web := []string{"-role", "web", "-event-handler", `query:load=echo "$SERF_SELF_NAME"`, "-event-handler",
		"query:fail=echo out; echo no disk >&2; exit 3",
		"-event-handler", "query:big=head -c 5000 /dev/zero | tr '\\0' x",
		"-event-handler", "query:slow=sleep 8; echo late",
		"-event-handler", `query:tell=echo "$SERF_EVENT $SERF_QUERY_NAME $((SERF_QUERY_LTIME > 0)) [$(cat)]"`}
	web1 = startAgent(t, append(web, "-node", "web1")...)
	web2 = startAgent(t, append(web, "-node", "web2", "-join", web1.advertised)...)
	db = startAgent(t, "-node", "db", "-role", "db", "-join", web1.advertised)
	waitAlive(t, []string{"web1", "web2", "db"}, web1, web2, db)
	return web1, web2, db
}

func TestQueryEndsWhenAllHaveAnswered(t *testing.T) {
	t.Parallel()
	web1, web2, db := querySite(t)
	for _, c := range []struct {
		from       *agent
		args, name string
		acks, said string // by whom, and lines
	}{
		{db, "", "load", "db web1 web2", "Response from 'web1': web1|Response from 'web2': web2"},
		{web1, "-node web2", "load", "web2", "Response from 'web2': web2"},
		{web1, "-tag role=d.", "load", "db", ""},
		{web2, "-tag role=web -node web1 -node db", "load", "web1", "Response from 'web1': web1"},
		{db, "-node web1", "tell", "web1", "Response from 'web1': query tell 1 []"},
		{db, "-node web1", "tell 3f2c1aa", "web1", "Response from 'web1': query tell 1 [3f2c1aa]"},
		{db, "-node web1", "fail", "web1", "Failed on 'web1': exit status 3|no disk|out"},
		{db, "", "nobody-has-a-handler", "db web1 web2", ""},
	} {
		want := []string{"Query '" + strings.Fields(c.name)[0] + "' dispatched"}
		for _, who := range strings.Fields(c.acks) {
			want = append(want, "Ack from '"+who+"'")
		}
		if c.said != "" {
			want = append(want, strings.Split(c.said, "|")...)
		}
		want = append(want, fmt.Sprint("Total Acks: ", len(strings.Fields(c.acks))),
			fmt.Sprint("Total Responses: ", strings.Count(c.said, "Response")))
		if diff := cmp.Diff(want, c.from.askQuery(0, nil,
			strings.Fields(c.args+" "+c.name)...)); diff != "" {
			t.Errorf("query %s %s at %s: wanted, printed\n%s", c.args, c.name, c.from.name, diff)
		}
	}
}

func TestQueryOutputIsShortOrJSONOnRequest(t *testing.T) {
	t.Parallel()
	_, _, db := querySite(t)
	out, _, _ := db.run("query", "-no-ack", "load")
	if rows := strings.Split(out, "\n"); strings.Contains(out, "Ack") || len(rows) != 5 ||
		rows[0] != "Query 'load' dispatched" || rows[3] != "Total Responses: 2" {
		t.Errorf("-no-ack:\n%s", out)
	}
	big := db.askQuery(0, nil, "-node", "web2", "big")
	if answer, ok := strings.CutPrefix(big[2], "Response from 'web2': xxx"); !ok || len(answer) > 1024 ||
		!strings.HasSuffix(answer, "x... (cut: 5000 bytes)") {
		t.Errorf("an answer of 5,000 bytes:\n%s", strings.Join(big, "\n"))
	}
	var js struct {
		Acks                []string
		Responses, Failures map[string]string
	}
	out, _, code := db.run("query", "-format", "json", "-tag", "role=web", "load")
	if err := json.Unmarshal([]byte(out), &js); err != nil || code != 0 ||
		!maps.Equal(js.Responses, map[string]string{"web1": "web1\n", "web2": "web2\n"}) ||
		len(js.Acks) != 2 {
		t.Errorf("json: exit %d, %v, %s", code, err, out)
	}
	out, _, _ = db.run("query", "-format", "json", "-node", "web1", "fail")
	if err := json.Unmarshal([]byte(out), &js); err != nil ||
		!strings.HasPrefix(js.Failures["web1"], "exit status 3\n") || len(js.Acks) != 1 {
		t.Errorf("json of a failure: %v, %s", err, out)
	}
}

func TestQueryNamesTheMembersThatDidNotAnswer(t *testing.T) {
	t.Parallel()
	_, web2, db := querySite(t)
	if out := db.askQuery(1, []string{"hamlet: error: nobody is asked"}, "-node", "nobody", "load"); out[0] != "" {
		t.Errorf("a query to nobody prints %q", out)
	}
	// Where a filter matches no member, all that were asked have answered.
	for _, args := range []string{"-tag role=none load", "-tag none=.* load", "-node db -tag role=web load"} {
		out := db.askQuery(0, nil, strings.Fields(args)...)
		if diff := cmp.Diff([]string{"Query 'load' dispatched", "Total Acks: 0", "Total Responses: 0"}, out); diff != "" {
			t.Errorf("query %s: wanted, printed\n%s", args, diff)
		}
	}
	if out, errs, code := db.run("query", "-format", "json", "-tag", "role=none", "load"); code != 0 ||
		out != "{\n  \"Acks\": null,\n  \"Responses\": {}\n}\n" || errs != "" {
		t.Errorf("JSON of a query to nobody: exit %d, %s%s", code, out, errs)
	}
	lines := db.askQuery(1, []string{"no answer from web1\n"}, "-timeout", "300ms", "-node", "web1", "-node", "web1", "slow")
	if diff := cmp.Diff([]string{"Query 'slow' dispatched", "Ack from 'web1'", "Total Acks: 1",
		"Total Responses: 0"}, lines); diff != "" {
		t.Errorf("a slow handler: wanted, printed\n%s", diff)
	}
	web2.signal(syscall.SIGSTOP) // not called dead for it: it is asked
	lines = db.askQuery(1, []string{"no answer from web2\n"}, "-timeout", "700ms", "load")
	if last := lines[len(lines)-1]; last != "Total Responses: 1" ||
		!slices.Contains(lines, "Response from 'web1': web1") || slices.Contains(lines, "Ack from 'web2'") {
		t.Errorf("one is stopped:\n%s", strings.Join(lines, "\n"))
	}
	web2.signal(syscall.SIGCONT)
	asking := launch(t, hamletCmd("query", "-rpc-addr", db.rpc, "-node", "web2", "-timeout", "20s", "slow"),
		here)
	eventually(t, "web2 has the query", func() bool {
		return strings.Contains(asking.stdout.String(),
			"Ack from 'web2'")
	})
	start := time.Now()
	web2.kill() // from the dead nobody waits for an answer
	if code := asking.wait(); code != 1 || time.Since(start) > 5*time.Second ||
		!strings.Contains(asking.stderr.String(), "web2") {
		t.Errorf("one died: exit %d after %v, %s%s", code, time.Since(start), asking.stdout, asking.stderr)
	}
}

// watching starts a watch, and waits until it has shown the members.
func (a *agent) watching(there int, args ...string) *agent {
	a.t.Helper()
	w := launch(a.t, hamletCmd(append([]string{"watch", "-rpc-addr", a.rpc}, args...)...), here)
	eventually(a.t, "watch begins", func() bool { return strings.Count(w.stdout.String(), "\n") >= there })
	return w
}

// isObject reports whether a line is a JSON object with these keys and no more.
func isObject(line string, keys ...string) (object map[string]any, ok bool) {
	err := json.Unmarshal([]byte(line), &object)
	slices.Sort(keys)
	return object, err == nil && slices.Equal(slices.Sorted(maps.Keys(object)), keys)
}

func TestWatchBeginsWithTheMembersAndGoesOnWithEvents(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-role", "lb")
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	c := startAgent(t, "-node", "c", "-join", a.advertised)
	waitAlive(t, []string{"a", "b", "c"}, a, b, c)
	text, objects := a.watching(3), a.watching(3, "-format", "json")
	both := func(what string) {
		t.Helper()
		eventually(t, what, func() bool {
			return strings.Contains(text.stdout.String(), what) &&
				strings.Contains(objects.stdout.String(), `"`+what+`"`)
		})
	}
	b.run("event", "deploy", "3f\t\x1b2c")
	both("deploy")
	b.run("tags", "-set", "state=drain", "-set", "role=web")
	both("member-update")
	b.kill()
	both("member-failed")
	c.int()
	both("member-leave")
	var rows []string
	for line := range strings.Lines(text.stdout.String()) {
		row := regexp.MustCompile(`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (.*)\n$`).FindStringSubmatch(line)
		if row == nil {
			t.Fatalf("line %q", line)
		}
		rows = append(rows, row[1])
	}
	slices.Sort(rows[:3])
	want := []string{"member: a " + a.advertised + " alive role=lb", "member: b " + b.advertised + " alive",
		"member: c " + c.advertised + " alive",
		`user: deploy 3f\t\x1b2c (from b)`, "member-update: b " + b.advertised + " alive role=web,state=drain (role=web state=drain)",
		"member-failed: b " + b.advertised + " failed role=web,state=drain",
		"member-leave: c " + c.advertised + " left"}
	if diff := cmp.Diff(want, rows); diff != "" {
		t.Errorf("wanted, shown\n%s", diff)
	}
	checkObjects(t, strings.Split(strings.TrimSuffix(objects.stdout.String(), "\n"), "\n"), b.advertised)
}

// checkObjects looks at what the same watch shows to programs.
func checkObjects(t *testing.T, lines []string, b string) {
	t.Helper()
	if len(lines) != 7 {
		t.Fatalf("%d objects:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	for i, line := range lines {
		object, ok := isObject(line, "time", "event", "name", "addr", "tags", "status")
		if i == 4 {
			object, ok = isObject(line, "time", "event", "name", "addr", "tags", "status", "changed")
			ok = ok && object["changed"] == "role=web state=drain"
		}
		if i == 3 {
			object, ok = isObject(line, "time", "event", "name", "payload", "ltime", "from")
			ok = ok && object["event"] == "user" && object["payload"] == "3f\t\x1b2c" &&
				object["from"] == "b" && object["ltime"].(float64) > 0
		}
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(object["time"]))
		if !ok || err != nil || time.Since(at) > time.Minute || i < 3 && object["event"] != "member" {
			t.Errorf("object %d: %v, %s", i, err, line)
		}
	}
	if o, _ := isObject(lines[4]); o["name"] != "b" || o["addr"] != b ||
		o["status"] != "alive" || fmt.Sprint(o["tags"]) != "map[role:web state:drain]" {
		t.Errorf("the update: %s", lines[4])
	}
}

func TestWatchShowsWhatIsAskedForAndEndsThen(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	two := a.watching(0, "-event", "user:done,member-join", "-n", "2", "-timeout", "30s")
	all := a.watching(1, "-event", "member,user") // which watches now, and so two nearly does
	for range 40 {
		a.run("event", "other")
		a.run("event", "done", "well")
		if two.hasExited() {
			break
		}
	}
	if code := two.wait(); code != 0 ||
		!regexp.MustCompile(`^(\S+ \S+ user: done well \(from [ab]\)\n){2}$`).MatchString(two.stdout.String()) {
		t.Errorf("two events: exit %d, %s%s", code, two.stdout, two.stderr)
	}
	startAgent(t, "-node", "b", "-join", a.advertised)
	a.waitStatus("b", "alive")
	a.run("event", "last")
	eventually(t, "the last event", func() bool {
		return strings.Contains(all.stdout.String(),
			"user: last")
	})
	if s := all.stdout.String(); strings.Count(s, "member") != 1 || !strings.Contains(s, " user: other ") {
		t.Errorf("the members, and user events:\n%s", s)
	}
	start := time.Now()
	out, errs, code := a.run("watch", "-event", "user:never", "-n", "1", "-timeout", "300ms")
	wantEnd(t, "a watch in vain", code, 1, errs, "hamlet: error: fewer than 1 events within 300ms\n")
	if took := time.Since(start); took < 250*ms || took > 5*time.Second || out != "" {
		t.Errorf("a watch in vain took %v and printed %q", took, out)
	}
	for _, c := range []struct{ args, want string }{
		{"-event member-jion", `"member-jion"`}, {"-timeout 1s", "-timeout needs -n"}, {"-format xml",
			`"xml"`}, {"-n one", `"one"`}, {"a", `"a"`},
	} {
		_, errs, code := a.run("watch", strings.Fields(c.args)...)
		wantEnd(t, "watch "+c.args, code, 2, errs, c.want)
	}
}

func TestWatchEndsWithItsAgent(t *testing.T) {
	t.Parallel()
	for end, want := range map[syscall.Signal]int{syscall.SIGINT: 0, syscall.SIGTERM: 0,
		syscall.SIGKILL: 1} {
		a := startAgent(t, "-node", "a")
		w := a.watching(1)
		a.signal(end)
		code := w.wait()
		wantErr := map[int][]string{1: {"hamlet: error: ", a.rpc}}[want]
		wantEnd(t, end.String(), code, want, w.stderr.String(), wantErr...)
	}
}

// goroutines is what info says of the agent's process.
func (a *agent) goroutines() (n int) {
	out, _, _ := runCmd(a.t, askCmd(a.rpc, "info", "-format", "json"))
	var info struct{ Runtime struct{ Goroutines string } }
	json.Unmarshal([]byte(out), &info)
	fmt.Sscan(info.Runtime.Goroutines, &n)
	return n
}

func TestWatchersThatDoNotReadOrVanishCostNothing(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	fds, goroutines := a.fds(), a.goroutines()
	var idle, gone []*agent
	for range 3 { // these read no more
		w := a.watching(1)
		w.signal(syscall.SIGSTOP)
		idle = append(idle, w)
	}
	for range 100 {
		w := launch(t, askCmd(a.rpc, "watch"), here)
		eventually(t, "watch begins", func() bool { return strings.Contains(w.stdout.String(), "member: a") })
		gone = append(gone, w)
	}
	if a.fds() > 0 && a.fds() < fds+103 || a.goroutines() < goroutines+103 {
		t.Errorf("103 watchers are %d descriptors and %d goroutines; without them %d and %d", a.fds(),
			a.goroutines(), fds, goroutines)
	}
	reader := a.watching(1)
	payload := strings.Repeat("x", 1000)
	for i := range 20 {
		start, name := time.Now(), fmt.Sprint("e", i)
		_, errs, code := runCmd(t, askCmd(a.rpc, "event", name, payload))
		wantEnd(t, "an event", code, 0, errs)
		eventually(t, name+" at a watcher that reads", func() bool {
			return strings.Contains(reader.stdout.String(),
				"user: "+name+" xxx")
		})
		if took := time.Since(start); took > 4*time.Second { // a watcher that holds it up is given five
			t.Errorf("a watcher that does not read delays event %d by %v", i, took)
		}
		if i == 10 {
			for _, w := range gone {
				w.kill()
			}
		}
	}
	for _, w := range idle {
		w.kill()
	}
	reader.kill()
	eventually(t, "nothing is left of the watchers",
		func() bool { return a.fds() <= fds && a.goroutines() <= goroutines })
}

func TestInfoTellsWhatTheAgentKnowsOfItself(t *testing.T) {
	t.Parallel()
	nobody := freePort(t)
	a := startAgent(t, "-node", "a", "-tag", "zone=a", "-join", nobody+",127.0.0.1:1", "-event-handler",
		"user:slow=sleep 60",
		"-event-handler", "user:bad=exit 3", "-event-handler", "member-reap=true")
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	c := startAgent(t, "-node", "c", "-join", a.advertised)
	waitAlive(t, []string{"a", "b", "c"}, a)
	b.kill()
	c.int()
	a.waitStatus("b", "failed")
	a.waitStatus("c", "left")
	for range 3 {
		a.run("event", "-coalesce=false", "slow")
	}
	a.run("event", "bad")
	a.waitLog("handler 'user:bad=exit 3' failed")
	var info map[string]map[string]string // a value that is no string is an error
	out, errs, code := a.run("info", "-format", "json")
	wantEnd(t, "info", code, 0, errs)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for key, want := range map[string]string{
		"agent name": "a", "agent addr": regexp.QuoteMeta(a.advertised), "agent uptime": `\d+s`,
		"agent version": `\S+`,
		"runtime arch":  `\w+`, "runtime os": `\w+`, "runtime version": `go1\..*`,
		"runtime goroutines": `\d+`, "runtime cpu_count": `\d+`, "runtime max_procs": `\d+`,
		"serf members": "3", "serf failed": "1", "serf left": "1", "serf encrypted": "false",
		"serf cut_off": "false", "serf event_time": `[1-9]\d*`,
		"serf seeds": regexp.QuoteMeta(nobody + ",127.0.0.1:1"), "serf seeds_error": ".*" +
			regexp.QuoteMeta(nobody) + ": connection refused.*",
		"tags zone": "a",
	} {
		group, name, _ := strings.Cut(key, " ")
		if got, ok := info[group][name]; !ok || !regexp.MustCompile("^"+want+"$").MatchString(got) {
			t.Errorf("%s: %q (there: %v), want %s", key, got, ok, want)
		}
	}
	if groups := slices.Sorted(maps.Keys(info)); !slices.Equal(groups,
		[]string{"agent", "event_handlers", "runtime", "serf", "tags"}) {
		t.Errorf("groups %q", groups)
	}
	text, _, _ := a.run("info")
	if !regexp.MustCompile(`^(\w+:\n(\t[^\n]+ = [^\n]*\n)*)+$`).MatchString(text) {
		t.Errorf("text:\n%s", text)
	}
	// However a handler is called there: what waits, what was dropped, how it ended.
	for _, want := range []string{`\tuser:slow:? = sleep 60\n`, `\tuser:slow:? waiting = 2\n`,
		`\tuser:slow:? dropped = 0\n`, `\tuser:slow:? last run = never\n`,
		`\tuser:bad:? last run = exit status 3 after \S+, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n`,
		`\tmember-reap:? last run = never\n`} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

func TestInfoTellsWhetherItIsEncrypted(t *testing.T) {
	t.Parallel()
	keyed := startKeyed(t, testKeys[:1], "-node", "keyed")
	if text, _, _ := keyed.run("info"); !strings.Contains(text, "\tencrypted = true\n") ||
		!strings.HasSuffix(text, "tags:\n") {
		t.Errorf("with a key, without tags:\n%s", text)
	}
}

// ---- slips ----

// serfLike hangs up on a client that has said something, as a Serf agent does.
func serfLike(t *testing.T) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			c.Read(make([]byte, 1<<10))
			c.Close()
		}
	}()
	return ln.Addr().String()
}

// technical is what only programmers can read.
var technical = regexp.MustCompile(`->|(dial|read|write) tcp|reset by peer|invalid argument|EOF`)

func TestErrorExplainsASlip(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, b)
	_, port, _ := net.SplitHostPort(b.advertised)
	serf := serfLike(t)
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"join", b.rpc}, []string{b.rpc, "is the RPC port of a hamlet agent", "gossips on port " +
			port}},
		{[]string{"join", serf}, []string{serf, "is no hamlet agent", "Serf"}},
		{[]string{"join", "10.99.99.99"}, []string{"10.99.99.99:7946", "bound to 127.0.0.1",
			"no other machine", "-bind"}},
		{[]string{"members", "-wait", "9", "-timeout", "300ms"},
			[]string{"2 of 9 members alive after 300ms: a, b\n"}},
		{[]string{"members", "-wait", "1", "-name", "c", "-timeout", "300ms"},
			[]string{"0 of 1 members alive after 300ms: none\n"}},
		{[]string{"query", "q", strings.Repeat("p", 1024)}, []string{"1025 bytes", "the limit is 1024"}},
		{[]string{"event", "e", strings.Repeat("p", 1024)}, []string{"1025 bytes", "the limit is 1024"}},
		{[]string{"agent", "-node", "c", "-bind", "127.0.0.1:0", "-join", serf, "-retry-max", "1"},
			[]string{serf, "is no hamlet agent"}},
		{[]string{"agent", "-node", "b", "-bind", "127.0.0.1:0", "-join", a.advertised},
			[]string{`the name "b" is taken`, b.advertised, "hint: choose another name with -node"}},
	} {
		what, rpc := strings.Join(c.args, " "), a.rpc
		if c.args[0] == "agent" {
			rpc = "127.0.0.1:0"
		}
		_, errs, code := hamlet(t, append([]string{c.args[0], "-rpc-addr", rpc}, c.args[1:]...)...)
		wantEnd(t, what, code, 1, errs, c.want...)
		if technical.MatchString(errs) {
			t.Errorf("%s: not in plain words: %s", what, errs)
		}
	}
	_, errs, code := a.run("members", "-name", "(")
	wantEnd(t, "members -name (", code, 2, errs, `"("`, "missing closing )\n")
	if strings.Contains(errs, "?s") {
		t.Errorf("it shows a pattern that nobody typed: %s", errs)
	}
	for variable, value := range map[string]string{"HAMLET_EVENT_HANDLER": `awk "{print \$1,\$2}"`,
		"HAMLET_TAG": "note=a,b"} {
		cmd := hamletCmd(agentArgs()...)
		cmd.Env = append(cmd.Env, variable+"="+value)
		_, errs, code := runCmd(t, cmd)
		wantEnd(t, variable, code, 2, errs, variable, "commas", "newline")
		cmd = hamletCmd(agentArgs("-node", "whole")...)
		cmd.Env = append(cmd.Env, variable+"="+value+"\n") // as it advises
		whole := startAgentCmd(t, cmd)
		if tags := whole.member("whole").Tags; variable == "HAMLET_TAG" && tags["note"] != "a,b" {
			t.Errorf("with a newline: tags %q", tags)
		}
	}
}

// Start scripts run "until serf join SEED" on every node, on the seed too.
func TestJoinOfOneselfIsDoneAndSaysSo(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	out, errs, code := a.run("join", a.advertised)
	if code != 0 || errs != "" || !strings.Contains(out, "Successfully joined cluster by contacting 1 nodes.\n") ||
		!strings.Contains(out, a.advertised) || !strings.Contains(out, "this node itself") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}

	dead, b := freePort(t), startAgent(t, "-node", "b")
	if out, errs, code := a.run("join", dead, a.advertised); code != 0 {
		t.Errorf("with a dead one: exit %d, %s%s", code, out, errs)
	}
	out, errs, code = a.run("join", a.advertised, b.advertised)
	if code != 0 || !strings.Contains(out, "by contacting 2 nodes.\n") {
		t.Errorf("with another: exit %d, %s%s", code, out, errs)
	}
	waitAlive(t, []string{"a", "b"}, a, b)
	if _, errs, code := a.run("join", dead); code != 1 || !strings.Contains(errs, dead) {
		t.Errorf("a dead one alone: exit %d, %s", code, errs)
	}
}

func TestBindTakesAName(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-bind", "localhost:0")
	if !strings.HasPrefix(a.bind, "127.0.0.1:") || a.advertised != a.bind {
		t.Errorf("-bind localhost:0 listens on %s and advertises %s", a.bind, a.advertised)
	}
}

func TestSeedThatDoesNotAnswerIsNamed(t *testing.T) {
	t.Parallel()
	good, dead := startAgent(t, "-node", "good"), freePort(t)
	a := startAgent(t, "-node", "a", "-join", "no-such-host.invalid", "-join", dead, "-join",
		good.advertised)
	good.waitStatus("a", "alive")
	a.waitLog("[WARN] not all seeds answer (")
	for _, name := range []string{"no-such-host.invalid: ", dead + ": connection refused"} {
		if a.count(name) != 1 {
			t.Errorf("%s is not named once:\n%s", name, a.stderr)
		}
	}
}

func TestBannerAndLogTellAgentsOfOneHostApart(t *testing.T) {
	t.Parallel()
	a, b := startKeyed(t, testKeys[:1], "-node", "a"), startAgent(t, "-node", "b")
	for agent, want := range map[*agent]string{a: "    Encrypted: true\n", b: "    Encrypted: false\n"} {
		if !strings.HasSuffix(agent.stdout.String(), want) {
			t.Errorf("the banner of %s:\n%s", agent.name, agent.stdout)
		}
	}
	c := startAgent(t, "-node", "c", "-join", b.advertised)
	waitAlive(t, []string{"b", "c"}, b, c)
	c.run("event", "deploy", "3f2c1aa")
	for _, who := range []*agent{b, c} {
		who.waitLog("[INFO] user-event: deploy (from c, 7 bytes)\n")
	}
	c.kill()
	b.waitLog("[INFO] member-join: b " + b.advertised + "\n")
	b.waitLog("[INFO] member-join: c " + c.advertised + "\n")
	b.waitLog("[WARN] member-failed: c " + c.advertised + "\n")
}

// A script goes on at exit status 0: what it waited for must have happened.
func TestWatchThatEndsTooEarlyWithItsAgentFails(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	w := a.watching(1, "-n", "1", "-timeout", "30s")
	a.int()
	code := w.wait()
	wantEnd(t, "watch -n 1 at an agent that leaves", code, 1, w.stderr.String(), "hamlet: error: ",
		"0 of 1 events")
}

func TestReapIsNeverCalledPrune(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	a.waitStatus("b", "alive")
	w := a.watching(2)
	b.kill()
	a.waitStatus("b", "failed")
	a.run("force-leave", "-prune", "b")
	eventually(t, "it is reaped", func() bool {
		return strings.Contains(w.stdout.String(),
			"member-reap: b ")
	})
	if s := w.stdout.String(); strings.Contains(s, "pruned") ||
		!strings.Contains(s, "member-leave: b "+b.advertised+" left\n") {
		t.Errorf("members are alive, leaving, left or failed:\n%s", s)
	}
}

func TestTagWithAValueCannotBeDeleted(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-tag", "state=drain")
	for _, key := range []string{"state=drain", ""} {
		out, errs, code := a.run("tags", "-delete", key, "-set", "zone=b")
		wantEnd(t, "tags -delete "+key, code, 2, errs, `"`+key+`"`, "-delete")
		if tags := a.member("a").Tags; out != "" || !maps.Equal(tags, map[string]string{"state": "drain"}) {
			t.Errorf("tags -delete %q prints %q and leaves %q", key, out, tags)
		}
	}
}

func TestQueryNamesTheDeadAndTheAbsentThatDidNotAnswer(t *testing.T) {
	t.Parallel()
	_, web2, db := querySite(t)
	asking := launch(t, hamletCmd("query", "-rpc-addr", db.rpc, "-node", "web2", "-timeout", "20s", "slow"),
		here)
	eventually(t, "web2 has the query", func() bool {
		return strings.Contains(asking.stdout.String(),
			"Ack from 'web2'")
	})
	web2.kill()
	if code := asking.wait(); code != 1 || strings.Contains(asking.stderr.String(), "within 20s") ||
		!strings.Contains(asking.stderr.String(), "web2") {
		t.Errorf("it died long before 20 s: exit %d, %s", code, asking.stderr)
	}
	db.waitStatus("web2", "failed")
	lines := db.askQuery(1, []string{"hamlet: error: ", "web2", "nosuch"}, "-node", "web1", "-node", "web2",
		"-node", "nosuch", "load")
	if !slices.Contains(lines, "Response from 'web1': web1") {
		t.Errorf("the living have answered:\n%s", strings.Join(lines, "\n"))
	}
}

// narrow is a way to an agent's RPC that holds few bytes, and that its reader can
// stop and open.
func narrow(t *testing.T, rpc string) (addr string, stopped *atomic.Bool) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	stopped = &atomic.Bool{}
	small := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 536)
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096)
		})
	}}
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			agent, err := small.Dial("tcp", rpc)
			if err != nil {
				c.Close()
				continue
			}
			go io.Copy(agent, c)
			go func() {
				defer c.Close()
				defer agent.Close()
				for buf := make([]byte, 512); err == nil; {
					for stopped.Load() {
						time.Sleep(ms)
					}
					var n int
					n, err = agent.Read(buf)
					c.Write(buf[:n])
				}
			}()
		}
	}()
	return ln.Addr().String(), stopped
}

// The user of a terminal that was halted comes back after more than seconds.
func TestWatchGoesOnWhenItsReaderHasPaused(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	rpc, stopped := narrow(t, a.rpc)
	w := launch(t, askCmd(rpc, "watch"), here)
	eventually(t, "watch begins", func() bool { return strings.Contains(w.stdout.String(), "member: a") })
	stopped.Store(true)
	const events = 500 // more than the way holds
	for i := range events {
		runCmd(t, askCmd(a.rpc, "event", "-coalesce=false", fmt.Sprint("e", i), strings.Repeat("x", 1000)))
	}
	time.Sleep(7 * time.Second)
	stopped.Store(false)
	a.run("event", "last")
	eventually(t, "the last event, or the end", func() bool {
		return strings.Contains(w.stdout.String(),
			"user: last") || w.hasExited()
	})
	if s := w.stdout.String(); strings.Count(s, "user: e") != events &&
		!strings.Contains(s, "lines are missing here") || w.hasExited() {
		t.Errorf("%d events, and %s", strings.Count(s, "user: e"), w.stderr)
	}
}

// A container with a share of a processor stands still for most of each tenth of
// a second: its script's output must not be lost meanwhile.
func TestQueryAnswerIsWholeWhereTheAgentGetsLittleTime(t *testing.T) {
	t.Parallel()
	const handlers, rounds = 8, 12
	args := []string{"-node", "a"}
	for i := range handlers {
		args = append(args, "-event-handler", fmt.Sprintf("query:q%d=echo fine", i))
	}
	a := startAgent(t, args...)
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; !isClosed(quit); i++ {
			a.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(60 * ms)
			a.cmd.Process.Signal(syscall.SIGCONT)
			time.Sleep(time.Duration(i%20) * 100 * time.Microsecond)
		}
	}()
	var all sync.WaitGroup
	var lost atomic.Int64
	for i := range handlers {
		all.Go(func() {
			for range rounds {
				out, _ := askCmd(a.rpc, "query", "-timeout", "60s", fmt.Sprint("q", i)).CombinedOutput()
				if strings.Contains(string(out), "Response from 'a': \n") {
					lost.Add(1)
				}
			}
		})
	}
	all.Wait()
	close(quit)
	<-ended
	if n := lost.Load(); n > 0 {
		t.Errorf("%d answers of %d are told as empty", n, handlers*rounds)
	}
}
