// config_test.go: start commands and configuration files in the shapes that are in use for Serf, and what a running agent
// takes over from them at SIGHUP.

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startCommands are what follows the name of the program, DIR standing for a folder with configFiles. The test adds
// addresses that are free here.
var startCommands = []string{
	"agent",
	"agent -node=web1",
	"agent --node web1",
	"agent -node web1 -bind 127.0.0.1",
	"agent -node=web1 -bind=127.0.0.1:0 -rpc-addr=127.0.0.1:0",
	"agent -node web1 -role web",
	"agent -role=lb -event-handler=/etc/serf/handler.sh",
	"agent -node agent-one -tag role=web -tag dc=east",
	"agent -tag role=web -event-handler 'member-join,member-leave,member-failed=/etc/serf/lb.sh'",
	"agent -event-handler 'user:deploy=echo deploy' -event-handler 'query:load=uptime'",
	"agent -event-handler query=/usr/local/bin/router -event-handler member-update=true",
	"agent -log-level=debug",
	"agent -log-level=DEBUG -join 127.0.0.1:1",
	"agent -log-level warn -join=127.0.0.1:1 -join=127.0.0.1:2",
	"agent -retry-join=127.0.0.1:1 -retry-interval=10s -retry-max=0",
	"agent -retry-join 127.0.0.1:1 -retry-interval 5s",
	"agent -join seed.invalid -replay",
	"agent -rpc-auth=secret",
	"agent -encrypt=cg8StVXbQJ0gPvMd9o7yrg==",
	"agent -encrypt=5eSuBLcKyGhPEbcdYi7JhmJ1OIXvNGEE",
	"agent -encrypt=T9jncgl9mbLus+baTTa7q7nPSUrXwbDi2dhbtqir37s=",
	"agent -advertise=127.0.0.1",
	"agent -advertise 127.0.0.1:7946",
	"agent -profile=wan",
	"agent -profile lan -node web1",
	"agent -profile=local -join=127.0.0.1:1",
	"agent -profile wan -protocol=5",
	"agent -protocol 4 -node web1",
	"agent -snapshot=/var/lib/serf/snapshot -rejoin",
	"agent -snapshot /var/lib/serf/snapshot",
	"agent -syslog -log-level=info",
	"agent -syslog=true",
	"agent -broadcast-timeout=10s",
	"agent -broadcast-timeout 3s -disable-compression",
	"agent -config-file=DIR/handlers.json",
	"agent -config-file DIR/ansible.json -node web1",
	"agent -config-file DIR/tags.json -config-file DIR/seeds.json",
	"agent -config-dir=DIR",
	"agent -config-dir DIR -log-level=debug",
	"agent -config-dir=DIR -tag role=web -event-handler true",
	"agent --config-dir=DIR --node=web1",
	"agent -reap-after=1h -leave-on-terminate",
	"agent -cluster blue -handler-timeout 10s",
}

// configFiles are shapes of Serf's configuration. All together, they fit into one folder.
var configFiles = map[string]string{
	"ansible.json": `{
  "role": "web",
  "bind": "127.0.0.1:0",
  "rpc_addr": "127.0.0.1:0",
  "log_level": "info",
  "start_join": ["127.0.0.1:1"],
  "event_handlers": ["member-join,member-failed=true"]
}`,
	"autoscale.json": `{"leave_on_terminate": true, "skip_leave_on_interrupt": false, "rejoin_after_leave": true}`,
	"discover.json":  `{"discover": "web", "mdns": {"interface": "eth0"}}`,
	"encrypt.json":   `{"encrypt_key": "cg8StVXbQJ0gPvMd9o7yrg=="}`,
	"handlers.json":  `{"event_handlers": ["/etc/serf/all.sh", "user:deploy=echo deploy", "query:load=uptime"]}`,
	"limits.json":    `{"query_response_size_limit": 4096, "user_event_size_limit": 512, "broadcast_timeout": "5s"}`,
	"network.json":   `{"advertise": "127.0.0.1", "interface": "", "protocol": 4, "profile": "wan"}`,
	"seeds.json":     `{"retry_join": ["127.0.0.1:1", "127.0.0.1:2"], "retry_interval": "10s", "retry_max_attempts": 0}`,
	"snapshot.json":  `{"snapshot_path": "/var/lib/serf/snapshot", "enable_syslog": false, "syslog_facility": "LOCAL0"}`,
	"statsd.json":    `{"statsite_addr": "127.0.0.1:8125", "statsd_addr": "127.0.0.1:8125", "disable_coordinates": true}`,
	"tags.json":      `{"tags": {"role": "web", "version": "1.2", "weight": 3, "ready": true}}`,
	"times.json":     `{"tombstone_timeout": "24h", "reconnect_timeout": "72h", "reconnect_interval": "30s", "replay_on_join": false}`,
}

func TestAgentStartsWithTheStartCommandsOfSerf(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range configFiles {
		writeFile(t, filepath.Join(dir, name), text)
	}
	for name := range configFiles {
		startCommands = append(startCommands, "agent -config-file DIR/"+name)
	}
	// A few at a time, since each is a process.
	for chunk := range slices.Chunk(startCommands, 6) {
		var agents []*agent
		for _, line := range chunk {
			line = strings.ReplaceAll(line, "DIR", dir)
			cmd := hamletCmd()
			cmd.Args = append(cmd.Args, shellWords(t, line)...)
			cmd.Args = append(cmd.Args, "-bind", "127.0.0.1:0", "-rpc-addr", "127.0.0.1:0")
			agents = append(agents, startAgentCmd(t, cmd))
		}
		for i, a := range agents {
			for _, bad := range []string{"[ERR]", "panic"} {
				if strings.Contains(a.stderr.String(), bad) {
					t.Errorf("%s:\n%s", chunk[i], a.stderr)
				}
			}
			a.kill()
		}
	}
}

// shellWords splits a command line as a shell does.
func shellWords(t *testing.T, line string) []string {
	t.Helper()
	out, err := exec.Command("/bin/sh", "-c", "printf '%s\\n' "+line).Output()
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
}

func TestOptionsThatHaveNoEffectAreOneWarningEach(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "a.json")
	writeFile(t, file, `{"snapshot_path": "/x", "node_name": "web1", "nonsense": 1, "discover": "web"}`)
	a := startAgent(t, "-profile", "wan", "-protocol=5", "-rejoin", "-config-file", file)
	a.waitLog("nonsense")
	for _, text := range []string{"-profile has no effect: ", "-protocol has no effect: ", "-rejoin has no effect: ",
		`"snapshot_path" has no effect: `, `hamlet has no "discover": name the seeds`, `there is no option "nonsense"`} {
		if n := a.count(text); n != 1 || !strings.Contains(a.stderr.String(), "[WARN] ") {
			t.Errorf("%d lines with %q:\n%s", n, text, a.stderr)
		}
	}
	if a.name != "web1" {
		t.Errorf("the name is %q", a.name)
	}
}

func TestConfigurationThatIsBrokenIsNamedWithFileAndLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "a.json")
	for text, want := range map[string]string{
		"{\n\"role\": \"web\"\n\"bind\": 1}": file + ": line 3: this is not JSON",
		"":                                   file + ": line 1: this is not JSON",
		`{"log_level": "loud"}`:              `"loud" is none of trace, debug, info`,
		`{"tombstone_timeout": "soon"}`:      file + `: tombstone_timeout: invalid value "soon"`,
		`{"tags": {"a=b": "c", "` + "\\u0000" + `": 1}}`: "bad tag",
		`{"encrypt_key": "short"}`:                       "-encrypt: key 1 of 1",
	} {
		writeFile(t, file, text)
		_, errs, code := hamlet(t, agentArgs("-config-file", file)...)
		if code == 0 || !strings.Contains(errs, want) || strings.Count(errs, "\n") > 2 || strings.Contains(errs, "goroutine") {
			t.Errorf("%s: exit %d, %s", text, code, errs)
		}
	}
	if _, errs, code := hamlet(t, agentArgs("-config-dir", dir+"/none")...); code != 1 || !strings.Contains(errs, dir+"/none: no such file") {
		t.Errorf("a folder that is not there: exit %d, %s", code, errs)
	}
}

func TestHangupChangesHandlersTagsAndLogLevel(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, ran := filepath.Join(dir, "a.json"), filepath.Join(dir, "ran")
	config := func(format string, args ...any) { writeFile(t, file, fmt.Sprintf(format, args...)) }
	config(`{"tags": {"role": "web", "zone": "a"}, "event_handlers": ["user:one=sleep 1; echo old >>%s"], "log_level": "info"}`, ran)
	a := startAgent(t, "-node", "a", "-config-file", file)
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, b)
	a.run("tags", "-set", "state=drain")
	b.run("event", "one")
	a.waitLog("user-event: one")

	config(`{"tags": {"role": "db", "name": "x"}, "event_handlers": ["user:two=echo new >>%s"], "log_level": "debug", "cluster": "c"}`, ran)
	a.signal(syscall.SIGHUP)
	a.waitLog("hangup")
	if out, errs, _ := b.run("members", "-name", "a"); !strings.Contains(out, "name=x,role=db,state=drain\n") {
		t.Errorf("tags after the hangup: %s%s", out, errs)
	}
	a.waitLog("[WARN] only a restart changes -cluster")
	b.run("event", "two")
	eventually(t, "the running handler ended, and the new one ran", func() bool {
		text := readFile(ran)
		return strings.Contains(text, "old\n") && strings.Contains(text, "new\n")
	})
	a.waitLog("[DEBUG] Event 'user' script output")

	// What is broken changes nothing.
	config(`{"tags": `)
	a.signal(syscall.SIGHUP)
	a.waitLog("[ERR] nothing is changed")
	config(`{"event_handlers": ["member-jion=x"]}`)
	a.signal(syscall.SIGHUP)
	a.waitLog("member-jion")
	if a.count("] member-failed:")+a.count("] member-leave:")+b.count("] member-failed:")+b.count("] member-leave:") > 0 {
		t.Errorf("somebody went:\n%s%s", a.stderr, b.stderr)
	}
}

// rotate changes the keys of agents in rounds, and returns the log lines about members that came meanwhile.
func rotate(t *testing.T, files []string, agents []*agent, rounds ...string) (events []string) {
	t.Helper()
	begin := time.Now()
	for _, keys := range rounds {
		for k, a := range agents {
			before := a.count("hangup: read")
			writeFile(t, files[k], fmt.Sprintf(`{"encrypt_key": "%s"}`, keys))
			a.signal(syscall.SIGHUP)
			eventually(t, "the options are read again", func() bool { return a.count("hangup: read") > before })
			time.Sleep(200 * ms) // heartbeats go on between agents that differ
		}
	}
	time.Sleep(3 * time.Second) // longer than any verdict takes
	for _, a := range agents {
		for _, l := range a.stderr.since(begin) {
			if strings.Contains(l.text, "member-") || strings.Contains(l.text, "[WARN]") {
				events = append(events, a.name+": "+l.text)
			}
		}
	}
	return events
}

func TestKeysChangeWithoutAnyMemberEvent(t *testing.T) {
	t.Parallel()
	newKeyOf := func() string {
		out, _, _ := hamlet(t, "keygen")
		return strings.TrimSpace(out)
	}
	first, second := newKeyOf(), newKeyOf()
	dir := t.TempDir()
	var files, names []string
	var agents []*agent
	for i := range 5 {
		names = append(names, fmt.Sprint("n", i))
		files = append(files, filepath.Join(dir, names[i]+".json"))
		writeFile(t, files[i], `{}`)
		args := []string{"-node", names[i], "-config-file", files[i]}
		if i > 0 {
			args = append(args, "-join", agents[0].advertised)
		}
		agents = append(agents, startAgent(t, args...))
	}
	waitAlive(t, names, agents...)

	// The first key comes as any other one does.
	events := rotate(t, files, agents, "none,"+first, first+",none", first)
	events = append(events, rotate(t, files, agents, first+","+second, second+","+first, second)...)
	for _, e := range events {
		if !strings.Contains(e, "key") {
			t.Errorf("while keys changed: %s", e)
		}
	}
	waitAlive(t, names, agents...)
	for _, a := range agents {
		out, _, _ := a.run("info")
		if !strings.Contains(out, "keys = 1\n") || !strings.Contains(out, "encrypted = true\n") || strings.Contains(out, second) {
			t.Errorf("%s: %s", a.name, out)
		}
	}
	late := startKeyed(t, []string{second}, "-node", "late", "-join", agents[0].advertised)
	waitAlive(t, names, late)
	old := startKeyed(t, []string{first}, "-node", "old", "-join", agents[0].advertised)
	old.waitLog("has another key")
}

func writeFile(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
