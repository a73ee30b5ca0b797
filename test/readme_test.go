package test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func readme(t *testing.T) string {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// readmeSession takes the README's sh blocks, which are commands, and its console
// blocks, where commands follow a $ and the rest is what they show.
func readmeSession(t *testing.T) (commands, shown []string) {
	text := strings.ReplaceAll(readme(t), " \\\n", " ") // a command on two lines
	for _, m := range regexp.MustCompile("(?s)\n```(sh|console)\n(.*?)```").FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(m[2]) {
			line = strings.TrimRight(line, "\n")
			if command, ok := strings.CutPrefix(line, "$ "); m[1] == "sh" || ok {
				commands = append(commands, command)
			} else if line != "..." {
				shown = append(shown, line)
			}
		}
	}
	return commands, shown
}

// readmeScript makes one script of the README's commands: agents, which a
// reader starts in terminals of their own, run in the background, and make
// targets are only looked up.
func readmeScript(commands []string) string {
	script, here := "set -e\npids=\ntrap 'kill $pids || :' EXIT\n", false
	for _, line := range commands {
		ready := ""
		switch {
		case strings.Contains(line, "<<'END'"):
			here = true
		case here:
			here = line != "END"
		case strings.HasPrefix(line, "make "):
			line = "make -C \"$SOURCE\" -n " + strings.TrimPrefix(line, "make ") + " >/dev/null"
		case strings.HasPrefix(line, "hamlet watch"):
			ready = "for i in $(seq 100); do ! grep -q ' member: web2 ' agents.log || break; sleep 0.1; done\n"
			fallthrough
		case strings.HasPrefix(line, "hamlet agent"):
			line = strings.TrimSuffix(line, " &") + " >>agents.log 2>&1 &\npids=\"$pids $!\""
		}
		if !here && line != "" && !strings.HasPrefix(line, "#") && line != "END" {
			script += "echo '$ " + strings.ReplaceAll(line, "'", `'\''`) + "'\n"
		}
		script += line + "\n" + ready
	}
	return script + "for i in $(seq 100); do grep -q 'late, I deploy' agents.log && grep -q '^3f2c1aa' agents.log && exit; sleep 0.1; done\n"
}

// times are what differs from run to run: times of day, durations, and loads.
var times = regexp.MustCompile(`(?m)\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d|after [0-9.]+(m?s|µs)|: \d+\.\d\d$`)

func TestTheCommandsOfTheReadmeWorkAndShowWhatItShows(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(program, filepath.Join(dir, "hamlet")); err != nil {
		t.Fatal(err)
	}
	source, _ := os.Getwd()
	commands, shown := readmeSession(t)
	script := readmeScript(commands)
	cmd := exec.Command("unshare", "-n", "sh", "-c", "ip link set lo up\n"+script)
	if err := exec.Command("unshare", "-n", "ip", "link", "set", "lo", "up").Run(); err != nil {
		// No network namespace of our own: the default ports must be free.
		l, err := net.Listen("tcp", "127.0.0.1:7373")
		if err != nil {
			t.Skipf("SKIPPED: %v, and no network namespace can be made", err)
		}
		l.Close()
		cmd = exec.Command("sh", "-c", script)
	}
	cmd.Dir = dir
	cmd.Env = append(hamletCmd().Env, "SOURCE="+source, "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	logs := readFile(filepath.Join(dir, "agents.log"))
	if err != nil {
		t.Fatalf("%v\n%s\nagents:\n%s", err, out, logs)
	}
	got := strings.Split(times.ReplaceAllString(string(out)+logs, "T"), "\n")
	for _, line := range shown {
		if !slices.Contains(got, times.ReplaceAllString(line, "T")) {
			t.Errorf("no command shows %q", line)
		}
	}
	if len(shown) < 20 || !strings.Contains(string(out), `"name": "web1"`) || !strings.Contains(logs, "New event: user deploy\n3f2c1aa\n") {
		t.Errorf("JSON, or what the handler shows, is missing, or only %d lines are shown", len(shown))
	}
	if t.Failed() {
		t.Logf("the session:\n%s\nagents:\n%s", out, logs)
	}
}

func TestWhatTheReadmeNamesExists(t *testing.T) {
	text := readme(t)
	for _, name := range commandNames(t) {
		if !strings.Contains(text, "| `"+name) && name != "version" {
			t.Errorf("the table of commands lacks %s", name)
		}
	}
	makefile, sources := readFile("Makefile"), ""
	for _, pattern := range []string{"*.go", "test/*.go"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			sources += readFile(f)
		}
	}
	for _, m := range regexp.MustCompile("`make ([a-z-]+)").FindAllStringSubmatch(text, -1) {
		if !strings.Contains(makefile, "\n"+m[1]+":") {
			t.Errorf("the README speaks of make %s, which does not exist", m[1])
		}
	}
	for _, m := range regexp.MustCompile("`(examples/[a-z/.-]+)`").FindAllStringSubmatch(text, -1) {
		if _, err := os.Stat(m[1]); err != nil {
			t.Errorf("the README speaks of %v", err)
		}
	}
	tests := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(text, -1)
	for _, name := range tests {
		if !strings.Contains(sources, "\nfunc "+name+"(") {
			t.Errorf("the README names %s, which does not exist", name)
		}
	}
	if len(tests) < 20 {
		t.Errorf("the README names only %d tests: its promises are without proof", len(tests))
	}
}

// The walk through the code that the README makes.
func TestTheFunctionsOfTheReadmesWalkExist(t *testing.T) {
	_, walk, _ := strings.Cut(readme(t), "A datagram with a claim")
	walk, _, _ = strings.Cut(walk, "\n\n")
	names := regexp.MustCompile("`([a-zA-Z]+)`").FindAllStringSubmatch(walk, -1)
	files, _ := filepath.Glob("*.go")
	sources := ""
	for _, f := range files {
		sources += readFile(f)
	}
	for _, m := range names {
		if !regexp.MustCompile(`(?m)^func (\([a-z]+ \*?\w+\) )?` + m[1] + `\(`).MatchString(sources) {
			t.Errorf("there is no function %s", m[1])
		}
	}
	if len(names) < 10 {
		t.Errorf("the walk names %d functions", len(names))
	}
}

func TestTheReadmesMapSaysHowLongTheRoomsAre(t *testing.T) {
	text := readFile("README.md")
	files, _ := filepath.Glob("*.go")
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		m := regexp.MustCompile(`(?m)^\| .` + regexp.QuoteMeta(f) + `. \|.*\| ([0-9,]+) \|$`).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("%s is not on the map", f)
			continue
		}
		said, _ := strconv.Atoi(strings.ReplaceAll(m[1], ",", ""))
		if lines := strings.Count(readFile(f), "\n"); lines > said*21/20 || lines < said*19/20 {
			t.Errorf("%s has %d lines, the README says %d", f, lines, said)
		}
	}
}
