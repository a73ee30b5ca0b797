// versions_test.go: agents of different protocols in one cluster. A later version is this one with a few lines changed as it
// is built: its protocol, one more kind of message, and something in the fields that are left for it.

package test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// laterLines are what is changed in gossip.go, line by line.
var laterLines = map[string]string{
	"	protocolVersion = 5\n": "	protocolVersion = %d\n",
	"	// Later versions have more kinds, and this one takes no notice of them.\n": "	msgLater\n",
	"	cfg.member.Protocol = protocolVersion\n":                                    "	cfg.member.Protocol = protocolVersion\n	cfg.member.Ext = \"said later\"\n",
	"	hdr := header{Kind: k, From":                                                "	hdr := header{Ext: \"said later\", Kind: k, From",
	// With each heartbeat, since two that answered each message so would never end.
	"	hdr := n.header(msgHeartbeat)\n": "	hdr := n.header(msgHeartbeat)\n	n.send(w.Member, n.header(msgLater), nil)\n",
}

// buildLater builds the program as a version with that protocol would be.
func buildLater(t *testing.T, protocol int) (path string) {
	t.Helper()
	dir := t.TempDir()
	text := readFile("gossip.go")
	for line, later := range laterLines {
		if strings.Count(text, line) != 1 {
			t.Fatalf("gossip.go has not one line %q", line)
		}
		if strings.Contains(later, "%d") {
			later = fmt.Sprintf(later, protocol)
		}
		text = strings.Replace(text, line, later, 1)
	}
	changed := filepath.Join(dir, "gossip.go")
	writeFile(t, changed, text)
	source, _ := filepath.Abs("gossip.go")
	overlay, _ := json.Marshal(map[string]any{"Replace": map[string]string{source: changed}})
	writeFile(t, filepath.Join(dir, "overlay.json"), string(overlay))

	path = filepath.Join(dir, fmt.Sprint("hamlet-", protocol))
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-buildvcs=false", "-o", path, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// startVersion starts an agent of that program.
func startVersion(t *testing.T, program string, args ...string) *agent {
	t.Helper()
	cmd := hamletCmd(agentArgs(args...)...)
	cmd.Path = program
	return startAgentCmd(t, cmd)
}

func TestVersionsRollForthAndBackUnderEvents(t *testing.T) {
	t.Parallel()
	later := buildLater(t, 6)
	const members = 5
	var names []string
	var agents []*agent
	former := make([][]*agent, members) // that had each name before
	for i := range members {
		names = append(names, fmt.Sprint("n", i))
		args := []string{"-node", names[i]}
		if i > 0 {
			args = append(args, "-join", agents[0].advertised)
		}
		agents = append(agents, startAgent(t, args...))
	}
	waitAlive(t, names, agents...)

	// Each event is sent while one member is replaced; all others must hear it, once.
	sent := make(map[string]int)
	for _, next := range []string{later, program} {
		for i := range members {
			sender := agents[(i+2)%members]
			send := func() {
				name := fmt.Sprintf("e%d.", len(sent))
				if _, errs, code := sender.run("event", "-coalesce=false", name); code != 0 {
					t.Errorf("event: %s", errs)
				}
				sent[name] = i
			}
			send()
			agents[i].int()
			for range 5 {
				send()
			}
			agents[i].wait()
			former[i] = append(former[i], agents[i])
			agents[i] = startVersion(t, next, "-node", names[i], "-join", agents[(i+1)%members].advertised)
			for range 5 {
				send()
			}
			waitAlive(t, names, agents...)
		}
		out, _, _ := agents[0].run("members", "-detailed")
		want := map[string]string{later: "protocol 6", program: "protocol 5"}[next]
		if strings.Count(out, want) != members {
			t.Errorf("not all have %s:\n%s", want, out)
		}
	}

	heard := func(i int, event string) (times int) {
		for _, a := range append(slices.Clone(former[i]), agents[i]) {
			times += a.count("user-event: " + event + " ")
		}
		return times
	}
	for event, replaced := range sent {
		for i := range members {
			if i == replaced {
				continue
			}
			eventually(t, fmt.Sprintf("%s at %s", event, names[i]), func() bool { return heard(i, event) > 0 })
			if times := heard(i, event); times != 1 {
				t.Errorf("%s heard %s %d times", names[i], event, times)
			}
		}
	}
	for i := range members {
		for _, a := range append(slices.Clone(former[i]), agents[i]) {
			text := a.stderr.String()
			// A seed that is replaced is missed for a moment.
			warned := strings.Count(text, "[WARN]") > strings.Count(text, "[WARN] no seed answers")
			if strings.Contains(text, "member-failed") || warned {
				t.Errorf("%s says:\n%s", names[i], text)
			}
		}
	}
}

func TestVersionsTwoApartSayWhichIsOlder(t *testing.T) {
	t.Parallel()
	older := startAgent(t, "-node", "older")
	newer := startVersion(t, buildLater(t, 7), "-node", "newer", "-join", older.advertised)
	newer.waitLog("speaks protocol 5, this agent 7: upgrade that one")
	older.waitLog("speaks protocol 7, this agent 5: upgrade this one")
	if out, errs, code := older.run("join", newer.advertised); code != 1 ||
		!strings.Contains(errs, "speaks protocol 7, this agent 5: upgrade this one") {
		t.Errorf("join: exit %d, %s%s", code, out, errs)
	}
	time.Sleep(time.Second) // long enough for many heartbeats to go astray
	if out, _, _ := older.run("members"); strings.Contains(out, "newer") {
		t.Errorf("the newer one came in:\n%s", out)
	}
}
