package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// --- what the user types

// agentCalledWith is an agent whose options are defined and not yet set.
func agentCalledWith(typed ...string) *agent {
	return newAgent(newOptions(command{name: "agent"}, typed, nil))
}

// optionsInHelp are what the help of a command says of each of its options.
func optionsInHelp(name string) map[string]string {
	said := make(map[string]string)
	for _, text := range strings.Split(help(name), "\n  -")[1:] {
		option := strings.Fields(text)[0]
		said[option] = text
	}
	return said
}

func TestHelpHasEveryCommandAndOptionWithItsDefault(t *testing.T) {
	for _, variable := range []string{"SERF_RPC_ADDR", "SERF_RPC_AUTH", "HAMLET_RPC_ADDR", "HAMLET_RPC_AUTH"} {
		t.Setenv(variable, "")
	}
	for _, c := range commands() {
		if !strings.Contains(help("help"), "\n  "+c.name+" ") || !strings.HasPrefix(help(c.name), "Usage: "+prog+" "+c.name) {
			t.Errorf("docs/commands.txt lacks %s", c.name)
		}
		usage, _, _ := strings.Cut(help(c.name), "\n")
		if !strings.HasSuffix(usage, c.args) {
			t.Errorf("help %s: the arguments are %s", c.name, c.args)
		}

		o := newOptions(c, []string{"-h"}, nil)
		if c.name == "agent" { // which would start another process where it is the first one
			newAgent(o)
		} else if err := c.run(o); err != flag.ErrHelp {
			t.Errorf("%s -h: %v", c.name, err)
		}
		said := optionsInHelp(c.name)
		o.flags.VisitAll(func(f *flag.Flag) {
			text, ok := said[f.Name]
			_, byDefault, _ := strings.Cut(strings.ReplaceAll(text, `"`, ""), "(default ")
			byDefault, _, _ = strings.Cut(byDefault, ")")
			if d, err := time.ParseDuration(byDefault); err == nil {
				byDefault = d.String()
			}
			isZero := slices.Contains([]string{"", "false", "0", "0s"}, f.DefValue)
			if !ok || !isZero && byDefault != f.DefValue {
				t.Errorf("help %s: -%s, whose default is %q: %q", c.name, f.Name, f.DefValue, text)
			}
			delete(said, f.Name)
		})
		if len(said) > 0 {
			t.Errorf("help %s has options that do not exist: %q", c.name, said)
		}
	}
}

func TestOptionsMayStandBehindArguments(t *testing.T) {
	for args, want := range map[string]string{
		"-n 3 a b":            "a b, n 3",
		"a -n 3 b":            "a b, n 3",
		"a b -n=3 -switch":    "a b, n 3 switch",
		"a -5":                "a -5, n 0",
		"a -switch=false -x":  "a -x, n 0",
		"-n 3 -- -n 4":        "-n 4, n 3",
		"a --n 3":             "a, n 3",
		"a -":                 "a -, n 0",
		"-n":                  "-n needs a value",
		"-switch=maybe":       `invalid value "maybe" for -switch: want true or false`,
		"-swich":              "there is no option -swich; did you mean -switch?",
		"-x a":                "there is no option -x",
		"-n three":            `invalid value "three" for -n: want a number, 0 or more`,
		"-h":                  flag.ErrHelp.Error(),
		"-syslogs -snapshott": "there is no option -syslogs",
	} {
		o := newOptions(command{}, strings.Fields(args), nil)
		n := o.flags.Int("n", 0, "")
		on := o.flags.Bool("switch", false, "")
		err := o.parseOptions()
		got := fmt.Sprintf("%s, n %d", strings.Join(o.args, " "), *n)
		if *on {
			got += " switch"
		}
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", args, got, want)
		}
	}
}

func TestNearestWordIsOneOrTwoLettersAway(t *testing.T) {
	names := []string{"members", "event", "leave", "join", "info", "query"}
	for word, want := range map[string]string{
		"member": "members", "memebrs": "members", "evnt": "event", "jion": "join", "quary": "query", "leafe": "leave",
		"x": "", "is": "", "foo": "", "evil-word": "", "": "",
	} {
		if got := nearest(word, names); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
}

func TestConfigurationFilesOfSerfAreRead(t *testing.T) {
	for text, want := range map[string]string{
		`{"node_name": "web1", "bind": "10.0.0.1:80", "log_level": "WARN"}`:         "web1 10.0.0.1:80 WARN",
		`{"event_handlers": ["a.sh", "user:deploy=b.sh"]}`:                          "handlers a.sh user:deploy=b.sh",
		`{"tags": {"role": "web", "zone": "b"}}`:                                    "tags map[role:web zone:b]",
		`{"role": "web"}`:                                                           "tags map[role:web]",
		`{"tags": {"dc": 3, "on": true}}`:                                           "tags map[dc:3 on:true]",
		`{"start_join": ["a", "b:1"], "retry_join": "c"}`:                           "seeds c a b:1",
		`{"retry_max_attempts": 4, "replay_on_join": true, "rpc_addr": ":1"}`:       "retry 4 replay rpc :1",
		`{"leave_on_terminate": true, "tombstone_timeout": "1h", "interface": "x"}`: "leave 1h0m0s x",
		`{"encrypt_key": "c2VjcmV0"}`:                                               "keys c2VjcmV0",
		`{"retry_join": null, "handler_timeout": "1m"}`:                             "timeout 1m0s",
		`{"profile": "wan", "protocol": 5, "snapshot_path": "/x"}`:                  "note f.json: \"profile\" has no effect; note f.json: \"protocol\" has no effect; note f.json: \"snapshot_path\" has no effect",
		`{"discover": "web"}`:                                                       "note f.json: hamlet has no \"discover\"",
		`{"keyring_file": "/etc/serf/keyring.json"}`:                                "error f.json: hamlet has no \"keyring_file\"",
		`{"nonsense": [1, {"a": [2]}]}`:                                             "note f.json: there is no option \"nonsense\"",
		"{\"role\": \"web\",\n\n\"x\" 3}":                                           "error f.json: line 3: this is not JSON",
		"[1]":                                                                       "error f.json: line 1: this is not JSON",
		`{"log_level": ["info", {"a": 1}], "retry_max_attempts": "many"}`:           "error f.json: retry_max_attempts: invalid value \"many\"",
		`{"replay_on_join": "maybe"}`:                                               "error f.json: replay_on_join: invalid value",
		``:                                                                          "error f.json: line 1",
	} {
		a := agentCalledWith()
		err := a.setFromJSON(nil, "f.json", []byte(text))
		got := fmt.Sprint(a.gossip.member.Name, " ", a.bind, " ", a.logLevel, " handlers ", strings.Join(a.options.set["event-handler"], " "),
			" tags ", a.tags, " seeds ", strings.Join(a.gossip.seeds, " "), " retry ", a.gossip.retryMax, " ")
		got += fmt.Sprint(map[bool]string{true: "replay "}[a.gossip.replay], "rpc ", a.rpcAddr, " ",
			map[bool]string{true: "leave "}[a.leaveOnTerminate], a.gossip.reapAfter, " ", a.gossip.iface, " keys ", strings.Join(a.options.set["encrypt"], " "),
			" timeout ", a.handlers.timeout, " error ", err)
		for _, note := range a.options.notes {
			got += " note " + note + ";"
		}
		for _, w := range strings.Split(want, "; ") {
			if !strings.Contains(got, w) {
				t.Errorf("%s\ngives %s\nwant %s", text, got, w)
			}
		}
	}
}

func TestFlagWinsOverEnvironmentAndThatOverFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.json")
	config := `{"node_name": "file", "log_level": "warn", "cluster": "file", "tags": {"role": "file", "zone": "file"},
		"event_handlers": ["file.sh"], "start_join": ["file"], "encrypt_key": "c2VjcmV0c2VjcmV0c2VjcmV0"}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	const key = "Y2x1c3RlcnNsaWtldGhpcw=="
	a := agentCalledWith("-node", "flag", "-tag", "role=flag", "-config-file", file, "-event-handler", "flag.sh", "-encrypt", key)
	a.options.environ = []string{"HAMLET_NODE=env", "HAMLET_LOG_LEVEL=debug", "HAMLET_JOIN=env"}
	if err := a.read(); err != nil {
		t.Fatal(err)
	}
	got := strings.TrimSpace(fmt.Sprintln(a.gossip.member.Name, a.logLevel, a.gossip.cluster, a.tags, a.handlers.specs, a.gossip.seeds, a.options.set["encrypt"]))
	want := "flag debug file map[role:flag zone:file] [flag.sh file.sh] [env file] [" + key + "]"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestConfigurationFolderIsReadInOrderOfNames(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"20-b.json": `{"log_level": "debug", "event_handlers": ["b"]}`,
		"10-a.json": `{"log_level": "warn", "event_handlers": ["a"]}`,
		"30-c.txt":  `not JSON`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := agentCalledWith("-config-dir", dir)
	if err := a.read(); err != nil || a.logLevel != "debug" || !slices.Equal(a.handlers.specs, []string{"a", "b"}) {
		t.Errorf("%+v, %v", a, err)
	}
	if err := agentCalledWith("-config-dir", dir+"/none").read(); err == nil || !strings.Contains(err.Error(), "none: no such file") {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// --- addresses

func TestAddressWithoutAPortHasTheDefaultOne(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1":            "10.0.0.1 7946",
		"10.0.0.1:80":         "10.0.0.1 80",
		"::1":                 "::1 7946",
		"[::1]":               "::1 7946",
		"[::1]:80":            "::1 80",
		"[fe80::1%eth0]:80":   "fe80::1%eth0 80",
		"web1":                "web1 7946",
		"web_1.example.com:1": "web_1.example.com 1",
		":80":                 " 80",
		"a:b":                 "", "a:1:2": "", "a:70000": "", "a b": "", "a:": "", "http://x": "", "[x": "", "-x": "", "a\x1b": "",
	} {
		host, port, err := hostPort(in, defaultPort)
		if got := host + " " + port; err == nil && got != want || err != nil && want != "" {
			t.Errorf("hostPort(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestAddressToAdvertiseIsChosen(t *testing.T) {
	any4, any6 := netip.MustParseAddrPort("0.0.0.0:7946"), netip.MustParseAddrPort("[::]:7946")
	advertised := func(bind netip.AddrPort, seeds ...string) (netip.AddrPort, string) {
		got, why, err := (&agent{gossip: gossipConfig{bind: bind, nodeConfig: nodeConfig{seeds: seeds}}}).advertised(t.Context())
		if err != nil {
			t.Errorf("bound to %s: %v", bind, err)
		}
		return got, why
	}
	bound := netip.MustParseAddrPort("127.0.0.9:7000")
	if got, why := advertised(bound, "10.0.0.1"); got != bound || why != "the bound address" {
		t.Errorf("bound to %s: advertised %s (%s)", bound, got, why)
	}
	for _, bind := range []netip.AddrPort{any4, any6} {
		for _, seeds := range [][]string{nil, {"127.0.0.1"}, {"[::1]:7946", "no.such.host.invalid"}, {"198.51.100.9:1234"}} {
			got, why := advertised(bind, seeds...)
			ip := got.Addr()
			alone := why == "no other address was found"
			if !ip.IsValid() || ip.IsUnspecified() || ip.IsLoopback() != alone || ip.IsMulticast() || got.Port() != 7946 || why == "" {
				t.Errorf("bind %s, seeds %v: advertised %s (%s)", bind, seeds, got, why)
			}
			if bind == any4 && !ip.Is4() {
				t.Errorf("bind %s: advertised %s, which does not arrive there", bind, got)
			}
		}
	}
	for _, bad := range []string{"0.0.0.0", "127.0.0.1", "::", "::1", "fe80::1", "224.0.0.1", "169.254.1.1", "2001:db8::1%eth0"} {
		if usable(netip.MustParseAddr(bad), netip.IPv6Unspecified()) {
			t.Errorf("%s counts as usable", bad)
		}
	}
	for _, good := range []string{"8.8.8.8", "10.0.0.1", "100.64.0.1", "192.168.1.1", "2001:db8::1", "fd00::1"} {
		if !usable(netip.MustParseAddr(good), netip.IPv6Unspecified()) {
			t.Errorf("%s does not count as usable", good)
		}
	}
}

func TestAddressOfTheAdvertiseOptionDecides(t *testing.T) {
	for _, tt := range []struct{ bind, advertise, want string }{
		{"0.0.0.0:7000", "10.1.2.3", "10.1.2.3:7000"},
		{"0.0.0.0:7000", "10.1.2.3:80", "10.1.2.3:80"},
		{"0.0.0.0:7000", "localhost", "127.0.0.1:7000"},
		{"0.0.0.0:7000", "[::ffff:10.1.2.3%eth0]:80", "10.1.2.3:80"},
		{"[::]:7000", "2001:db8::5", "[2001:db8::5]:7000"},
		{"[::]:7000", "[2001:db8::5]:80", "[2001:db8::5]:80"},
		{"[::]:7000", "10.1.2.3", "10.1.2.3:7000"},
		{"0.0.0.0:7000", "2001:db8::5", ""},
		{"0.0.0.0:7000", "::", ""},
		{"0.0.0.0:7000", "no.such.host.invalid", ""},
	} {
		a := agent{advertise: tt.advertise, gossip: gossipConfig{bind: netip.MustParseAddrPort(tt.bind)}}
		got, _, err := a.advertised(t.Context())
		if err == nil && got.String() != tt.want || err != nil && tt.want != "" {
			t.Errorf("-bind %s -advertise %s: %s, %v; want %s", tt.bind, tt.advertise, got, err, tt.want)
		}
	}
}

// --- output

var exampleMembers = []Member{
	{Name: "c1fbbfe7c9ea", Addr: netip.MustParseAddrPort("172.17.0.20:7946"), Status: statusAlive},
	{Name: "precise64", Addr: netip.MustParseAddrPort("10.0.2.15:7946"), Status: statusAlive, Tags: "role=lb"},
}

// shown are members as the agent tells them to a command.
func shown(members ...Member) (list []memberStatus) {
	for _, m := range members {
		list = append(list, memberStatus{m, 90 * time.Second})
	}
	return list
}

func TestNamesAreSortedAsPeopleCount(t *testing.T) {
	want := []string{"Z", "a", "a-b", "host-8", "host-08", "host-79", "host-79a", "host-100", "web1.dc2", "web2.dc1", "web10.dc1"}
	got := slices.Clone(want)
	slices.Sort(got)
	slices.SortFunc(got, compareNames)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMembersDetailedShowsVersionAndTime(t *testing.T) {
	m := exampleMembers[1]
	m.Version = "0.2.0"
	m.Protocol = 5
	want := "precise64    10.0.2.15:7946    alive     for 1m30s    version 0.2.0    protocol 5    role=lb\n"
	if got := membersText(shown(m), true); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
	js := membersJSON(shown(m), true)
	for _, want := range []string{`"for": "1m30s"`, `"version": "0.2.0"`, `"protocol": 5`} {
		if !strings.Contains(js, want) {
			t.Errorf("no %s in %s", want, js)
		}
	}
}

func TestMembersTextIsAligned(t *testing.T) {
	want := "c1fbbfe7c9ea    172.17.0.20:7946    alive\n" +
		"precise64       10.0.2.15:7946      alive     role=lb\n"
	if got := membersText(shown(exampleMembers...), false); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
	ms := append(slices.Clone(exampleMembers), Member{Name: "ノード", Addr: netip.MustParseAddrPort("[2001:db8::7]:7946"), Status: statusLeaving, Tags: "a=1\x00b=x y"})
	want = "c1fbbfe7c9ea    172.17.0.20:7946      alive\n" +
		"precise64       10.0.2.15:7946        alive      role=lb\n" +
		"ノード          [2001:db8::7]:7946    leaving    a=1,b=x y\n"
	if got := membersText(shown(ms...), false); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
}

func TestMembersJSONIsSerfs(t *testing.T) {
	want := `{
  "members": [
    {
      "name": "c1fbbfe7c9ea",
      "addr": "172.17.0.20:7946",
      "port": 7946,
      "tags": {},
      "status": "alive"
    },
    {
      "name": "precise64",
      "addr": "10.0.2.15:7946",
      "port": 7946,
      "tags": {
        "role": "lb"
      },
      "status": "alive"
    }
  ]
}
`
	if got := membersJSON(shown(exampleMembers...), false); got != want {
		t.Error(cmp.Diff(want, got))
	}
	if got := membersJSON(nil, false); got != "{\n  \"members\": null\n}\n" {
		t.Errorf("no members: %q", got)
	}
}

func TestTerminalGetsNoEscapeSequencesOfPeers(t *testing.T) {
	nasty := "\x1b[2J\u009b31m\x7f\"\\\u202e\r\n\tü日\U0001f600\U000e0001"
	ms := []Member{{Name: nasty, Addr: exampleMembers[0].Addr, Status: statusAlive, Tags: Tags("k" + nasty + "=v" + nasty)}}
	graphic := func(s string) bool {
		return strings.IndexFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) && r != '\n' }) < 0
	}
	text, js := membersText(shown(ms...), false), membersJSON(shown(ms...), false)
	if !graphic(text) || strings.Count(text, "\n") != 1 {
		t.Errorf("text: %q", text)
	}
	if !graphic(js) {
		t.Errorf("json: %q", js)
	}
	var back struct {
		Members []struct {
			Name string
			Tags map[string]string
		}
	}
	if err := json.Unmarshal([]byte(js), &back); err != nil || back.Members[0].Name != nasty || back.Members[0].Tags["k"+nasty] != "v"+nasty {
		t.Errorf("json does not say the same: %v %q", err, back)
	}
	if got := printable("a\tb\n\x1bc\xff'\"\\", "\n\t"); got != "a\tb\n\\x1bc\\xff'\"\\" {
		t.Errorf("printable: %q", got)
	}
}

func TestEnvironmentListsAreSplitAtCommasOrLines(t *testing.T) {
	for in, want := range map[string][]string{
		"a":                            {"a"},
		" a , b ,, c,":                 {"a", "b", "c"},
		"member-join,member-leave=x,y": {"member-join,member-leave=x", "y"},
		"user:deploy,user=x":           {"user:deploy,user=x"},
		"user:deploy=x,y=z":            {"user:deploy=x", "y=z"},
		"member-join":                  {"member-join"},
		"awk -F, 1\n":                  {"awk -F, 1"},
		"a=1,2\nb=3":                   {"a=1,2", "b=3"},
		",":                            nil,
	} {
		a := agentCalledWith()
		err := a.options.setFromVariable("HAMLET_X", in, "event-handler")
		if got := a.options.set["event-handler"]; err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	// What would become two broken parts is told.
	for name, in := range map[string]string{"event-handler": `awk "{print $1,$2}"`, "tag": "note=a,b"} {
		a := agentCalledWith()
		if err := a.options.setFromVariable("HAMLET_X", in, name); err == nil || !strings.Contains(err.Error(), "newline") {
			t.Errorf("%s: %q, %v", in, a.options.set, err)
		}
		a = agentCalledWith()
		err := a.options.setFromVariable("HAMLET_X", in+"\n", name)
		if got := append(a.options.set["event-handler"], "note="+a.tags["note"]); err != nil || got[0] != in {
			t.Errorf("%s with a newline: %q, %v", in, got, err)
		}
	}
}

func TestJSONIsValidOnOneLineAndOnMany(t *testing.T) {
	v := map[string]any{"a": "x\n\"", "b": 3, "c": []any{"d", map[string]any{"e": true}}, "f": map[string]string{}, "g": []string(nil)}
	many, one := toJSON(v), toJSONLine(v)
	for _, text := range []string{many, one} {
		var back map[string]any
		if err := json.Unmarshal([]byte(text), &back); err != nil || len(back) != 5 || back["a"] != "x\n\"" {
			t.Errorf("%v: %s", err, text)
		}
	}
	if strings.Count(one, "\n") != 1 {
		t.Errorf("more than a line: %s", one)
	}
}

func TestWatchLinesAreTextOrJSON(t *testing.T) {
	m := Member{Name: "web1", Addr: netip.MustParseAddrPort("10.0.0.1:7946"), Status: statusFailed, Tags: "role=web"}
	at := time.Date(2013, 12, 8, 7, 56, 48, 0, time.Local)
	for _, tt := range []struct {
		ev         Event
		text, json string
	}{
		{Event{kind: eventFailed, update: update{Member: m}}, "2013/12/08 07:56:48 member-failed: web1 10.0.0.1:7946 failed role=web\n",
			`"event": "member-failed", "name": "web1", "addr": "10.0.0.1:7946", "tags": {"role": "web"}, "status": "failed"}`},
		{Event{update: update{Member: Member{Name: "a", Addr: m.Addr, Status: statusAlive}}}, "2013/12/08 07:56:48 member: a 10.0.0.1:7946 alive\n",
			`"event": "member", "name": "a", "addr": "10.0.0.1:7946", "tags": {}, "status": "alive"}`},
		{Event{kind: eventUser, update: update{Member: m, Name: "deploy", Payload: []byte("3f\n\x1b"), LTime: 7}}, "2013/12/08 07:56:48 user: deploy 3f\\n\\x1b (from web1)\n",
			`"event": "user", "name": "deploy", "payload": "3f\n\u001b", "ltime": 7, "from": "web1"}`},
	} {
		if got := watchLine(at, tt.ev, false); got != tt.text {
			t.Errorf("text: %q, want %q", got, tt.text)
		}
		if got := watchLine(at, tt.ev, true); !strings.HasPrefix(got, `{"time": "2013-12-08T`) || !strings.HasSuffix(got, tt.json+"\n") {
			t.Errorf("json: %s want %s", got, tt.json)
		}
	}
}

// A script's output forged whole lines of the log.
func TestLogLinesAreForgedByNoText(t *testing.T) {
	w := newLogWriter(levelDebug)
	forged := "2013/12/08 07:56:48 [ERR] forged"
	for _, end := range []string{"\n", "\r\n", "\r", "\u2028", "\u2029", "\u0085", "\v", "\f", "\n\n"} {
		w.log(logLine{levelDebug, fmt.Sprintf("Event 'user' script output: first%s%s", end, forged)})
		logged := strings.TrimSuffix(<-w.lines, "\n")
		for i, line := range strings.Split(logged, "\n") {
			if i > 0 && !strings.HasPrefix(line, "\t") || strings.ContainsFunc(line, obeyable) {
				t.Errorf("%q is logged as %q", end, logged)
			}
		}
	}
}

func TestLogIsFilteredByLevelAndEscaped(t *testing.T) {
	w := newLogWriter(logLevelOf("info"))
	for level := range levelNames {
		w.log(logLine{logLevel(level), "x\x1b[2Jy\n\tz"})
	}
	var got []string
	for len(w.lines) > 0 {
		got = append(got, (<-w.lines)[len("2013/12/08 07:56:48 "):])
	}
	want := []string{"[INFO] x\\x1b[2Jy\n\t\tz\n", "[WARN] x\\x1b[2Jy\n\t\tz\n", "[ERR] x\\x1b[2Jy\n\t\tz\n"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for range cap(w.lines) + 7 {
		w.log(logLine{levelInfo, "nobody reads this"}) // must not block
	}
	if n := w.dropped.Load(); n != 7 {
		t.Errorf("%d lines counted as lost, want 7", n)
	}
}

func TestLogOfTheJournalHasPriorityAndNoDate(t *testing.T) {
	for level, want := range []string{"<7>[TRACE] x\n", "<7>[DEBUG] x\n", "<6>[INFO] x\n", "<4>[WARN] x\n", "<3>[ERR] x\n"} {
		if got := formatLine(logLine{logLevel(level), "x"}, true); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// underRace reports whether the race detector is on: agents are then several
// times slower and larger.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
